"""What it costs to load, switch, disable and delete with ever more adapters on one model, by the processor's time.

That is what others on the machine disturb the least; on a GPU it is the clock's.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Settings, collect_garbage, processor_time, timed
from benchmarks.models import LIBRARIES, LLAMA_TARGETS, REFERENCE, SPLICE, llama, load, write_checkpoint
from benchmarks.report import Row, row

# What is timed, and how it is told.
STEPS = {
    "load": "load_adapter",
    "switch": "set_adapter, frozen (inference_mode)",
    "train": "set_adapter, to train",
    "disable": "disable_adapter, in and out",
    "delete": "delete_adapter, a frozen one",
    "delete active": "delete_adapter, the one in training",
}
# Adapters that are on the model already. The reference goes as far as the second number: the time of its loads grows with
# those that are there, and a thousand of them would take it hours.
COUNTS = (1, 10, 32, 100, 1000)
_REFERENCE_UP_TO = 32
_NEW = "the next one"


@dataclass(frozen=True)
class Among:
    """What one library takes with so many adapters on the model.

    Attributes:
        library: which one.
        count: adapters that are there already.
        seconds: by the names of `STEPS`.
    """

    library: str
    count: int
    seconds: dict[str, float]


def measured(settings: Settings) -> Iterator[list[Among]]:
    """Both libraries in turns at each of the `COUNTS`, on one base and with one checkpoint; for each count what was found."""
    base = llama(settings.pick(32, 1), 128, settings.device)
    checkpoint = write_checkpoint(base, settings.folder / "among", LLAMA_TARGETS, rank=8)
    models: dict[str, Any] = {}
    for library in LIBRARIES:
        load(library, copy.deepcopy(base), checkpoint)  # imports and generates what a first load does
        models[library] = load(library, copy.deepcopy(base), checkpoint, adapter_name=_name(0))
    for count in (1, 2, 5) if settings.small else COUNTS:
        if count > settings.pick(_REFERENCE_UP_TO, 2):
            models.pop(REFERENCE, None)
        for model in models.values():
            for number in range(len(model.peft_config), count):
                model.load_adapter(checkpoint, adapter_name=_name(number))
        collect_garbage()
        gc.freeze()  # else each collection, whoever causes it, looks through a thousand adapters
        rounds = settings.pick(2 if REFERENCE in models else 9, 1)
        taken: dict[str, list[dict[str, float]]] = {library: [] for library in models}
        for _ in range(rounds + 1):
            for library, model in models.items():
                taken[library].append(_steps(library, model, checkpoint, count, settings))
        gc.unfreeze()
        yield [Among(library, count, _medians(found[1:])) for library, found in taken.items()]


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {step: statistics.median(one[step] for one in found) for step in STEPS}


def _steps(library: str, model: Any, checkpoint: Path, count: int, settings: Settings) -> dict[str, float]:
    """Every step once, or so often that it can be timed; the model is what it was before."""
    on_cpu = settings.device.type == "cpu"
    spent = processor_time if on_cpu else lambda call, repeats=1: timed(call, settings.device, repeats)
    collect_garbage()  # which another library may have left
    add = partial(model.load_adapter, checkpoint, adapter_name=_NEW)
    repeats = 1 if library == REFERENCE else settings.pick(50, 2)
    found = {"load": spent(add)}
    for step, options in (("switch", {"inference_mode": True}), ("train", {})):
        switch = _switches(model, count, options)
        for _ in range(count if library == SPLICE else 0):
            switch()  # what is found out once about each adapter
        found[step] = spent(switch, repeats)
    found["disable"] = spent(partial(_disable, model), repeats)
    model.set_adapter(_name(0), inference_mode=True)
    found["delete"] = spent(partial(model.delete_adapter, _NEW))
    add(is_trainable=True)
    model.set_adapter(_NEW)
    found["delete active"] = spent(partial(model.delete_adapter, _NEW))
    model.set_adapter(_name(0), inference_mode=True)
    return found


def _disable(model: Any) -> None:
    with model.disable_adapter():
        pass


def _switches(model: Any, count: int, options: dict[str, bool]) -> Callable[[], None]:
    """A function that makes another adapter the active one at every call, the next one among them."""
    names = [*map(_name, range(count)), _NEW]
    turn = 0

    def switch() -> None:
        nonlocal turn
        turn += 1
        model.set_adapter(names[turn % len(names)], **options)

    return switch


def _name(number: int) -> str:
    return f"adapter-{number}"


def rows(found: list[Among]) -> Iterator[Row]:
    """A row for each number of adapters and each step; without the reference where it does not go."""
    times = {(one.library, one.count): one.seconds for one in found}
    for count in dict.fromkeys(one.count for one in found):
        for step, told in STEPS.items():
            reference = times.get((REFERENCE, count), {}).get(step)
            yield row(f"beside {count:,}: {told}", _micro(reference), _micro(times[SPLICE, count][step]), "us")


def _micro(seconds: float | None) -> float:
    return float("nan") if seconds is None else seconds * 1e6
