"""Many adapters on one model: what the next one costs to load, and what it costs to switch between them."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.measure import Settings, collect_garbage, timed
from benchmarks.models import LLAMA_TARGETS, REFERENCE, SPLICE, llama, load, write_checkpoint
from benchmarks.report import Row, row


@dataclass(frozen=True)
class Series:
    """What one library took, in seconds: every load in turn, then switches among all that was loaded."""

    loads: list[float]
    switch: float
    frozen_switch: float

    def load(self, number: int) -> float:
        """The median of five loads: of the first or the last five, or of those around the `number`th."""
        start = min(max(number - 3, 0), len(self.loads) - 5)
        return statistics.median(self.loads[start : start + 5])


def rows(settings: Settings) -> Iterator[Row]:
    """The 1st, 10th and 100th `load_adapter`, and `set_adapter` among these adapters, all of them frozen at first."""
    count = settings.pick(100, 12)
    base = llama(settings.pick(8, 1), 128, settings.device)
    checkpoint = write_checkpoint(base, settings.folder / "switching", LLAMA_TARGETS, rank=16)
    # The reference takes half a minute for a series and splice half a second: splice can have several.
    reference = [_series(REFERENCE, base, checkpoint, count, settings)]
    ours = [_series(SPLICE, base, checkpoint, count, settings) for _ in range(settings.pick(7, 1))]

    def compared(what: str, unit: str, figure: Callable[[Series], float]) -> Row:
        return row(what, _median(reference, figure), _median(ours, figure), unit)

    yield compared("load_adapter, 1st", "ms", lambda s: s.load(1) * 1e3)
    yield compared("load_adapter, 10th", "ms", lambda s: s.load(10) * 1e3)
    yield compared(f"load_adapter, {count}th", "ms", lambda s: s.load(count) * 1e3).at_least(100)
    yield compared(f"load_adapter, {count}th / 1st", "x", lambda s: s.load(count) / s.load(1)).at_most(1.2)
    frozen = f"set_adapter among {count} frozen (inference_mode)"
    yield compared(frozen, "us", lambda s: s.frozen_switch * 1e6).at_least(1000)
    # By default the call also makes the adapter's tensors trainable and those of the one before not.
    yield compared(f"set_adapter among {count}, to train", "us", lambda s: s.switch * 1e6)


def _median(several: Sequence[Series], figure: Callable[[Series], float]) -> float:
    return statistics.median(map(figure, several))


def _series(library: str, base: nn.Module, checkpoint: Path, count: int, settings: Settings) -> Series:
    # What a first load imports and generates is not what the first `load_adapter` is asked for.
    load(library, copy.deepcopy(base), checkpoint)
    model = load(library, copy.deepcopy(base), checkpoint, adapter_name="adapter-0")
    collect_garbage()
    loads = [
        timed(partial(model.load_adapter, checkpoint, adapter_name=f"adapter-{number}"), settings.device)
        for number in range(1, count + 1)
    ]
    repeats = 3 if library == REFERENCE else 500
    return Series(
        loads,
        timed(_switches(model, count), settings.device, repeats),
        timed(_switches(model, count, inference_mode=True), settings.device, repeats),
    )


def _switches(model: Any, count: int, **options: bool) -> Callable[[], None]:
    """A function that makes another adapter the active one at every call."""
    model.set_adapter("adapter-0", **options)
    turn = 0

    def switch() -> None:
        nonlocal turn
        turn = turn % count + 1
        model.set_adapter(f"adapter-{turn}", **options)

    return switch
