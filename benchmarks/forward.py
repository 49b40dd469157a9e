"""What un-merged adapters add to a forward: for one decode step, and for a batch in which every row has its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Settings, alternate, one_thread, timed
from benchmarks.models import LIBRARIES, LLAMA_TARGETS, REFERENCE, SPLICE, linears, llama, load, write_checkpoint
from benchmarks.report import Row, row

Call = Callable[[], torch.Tensor]
BASE = "base"
# splice once more, with the adapters in slots.
SLOTS = "slots"
_REPEATS = 4


def decode_rows(settings: Settings) -> Iterator[Row]:
    """One token through a stack of small adapted linears: what is left is the cost of getting to the adapter at all."""
    count, width = settings.pick(64, 4), 128
    yield decode_row(linears(count, width, settings.device), settings, "decode step").at_least(2.5)


def decode_row(base: nn.Sequential, settings: Settings, what: str, tolerance: float = 1e-4) -> Row:
    """What LoRA adds to each of these square layers."""
    count, width = len(base), base[0].in_features
    checkpoint = write_checkpoint(base, settings.folder / what, [str(i) for i in range(count)], rank=16)
    x = torch.randn(1, 1, width, device=settings.device)
    calls: dict[str, Call] = {BASE: partial(base, x)}
    for library in LIBRARIES:
        calls[library] = partial(load(library, copy.deepcopy(base), checkpoint), x)
    with one_thread():
        more = added(calls, settings.device, settings.pick(200, 3), tolerance)
    reference, ours = (more[library] / count * 1e6 for library in LIBRARIES)
    return row(f"{what}, added by each adapted linear ({width}x{width})", reference, ours, "us")


def mixed_rows(settings: Settings) -> Iterator[Row]:
    """One token for each row, each row with an adapter of its own."""
    count = settings.pick(32, 4)
    base = llama(settings.pick(4, 1), 512, settings.device)
    checkpoint = write_checkpoint(base, settings.folder / "mixed", LLAMA_TARGETS, rank=16)
    names = [f"adapter-{number}" for number in range(count)]
    ids = torch.arange(count, device=settings.device).unsqueeze(1)
    calls: dict[str, Call] = {BASE: partial(logits_of, base, ids)}
    for library in LIBRARIES:
        model = with_adapters(library, base, checkpoint, names)
        calls[library] = partial(logits_of, model, ids, adapter_names=names)
    slotted: Any = with_adapters(SPLICE, base, checkpoint, names)
    slotted.slots(count, rank=16)
    calls[SLOTS] = partial(logits_of, slotted, ids, adapter_names=names)
    more = added(calls, settings.device, rounds=settings.pick(50, 3))
    what = f"mixed batch, {count} rows, {count} adapters, added in all"
    yield row(what, more[REFERENCE] * 1e3, more[SPLICE] * 1e3, "ms").at_least(5)
    yield row(f"{what}: in slots", more[REFERENCE] * 1e3, more[SLOTS] * 1e3, "ms").at_least(5)
    # What a compiled model adds to the compiled base, beside what the reference adds without: it has no such thing.
    calls[BASE] = partial(logits_of, torch.compile(base, fullgraph=True), ids)
    step = torch.compile(slotted, fullgraph=True)
    calls[SLOTS] = partial(logits_of, step, ids, adapter_names=slotted.slot_rows(names))
    del calls[SPLICE]
    compiled = added(calls, settings.device, rounds=settings.pick(20, 3))
    yield row(f"{what}: in slots, compiled", more[REFERENCE] * 1e3, compiled[SLOTS] * 1e3, "ms").at_least(5)


def with_adapters(library: str, base: nn.Module, checkpoint: Path, names: list[str]) -> nn.Module:
    model: Any = load(library, copy.deepcopy(base), checkpoint, adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(checkpoint, adapter_name=name)
    return model  # type: ignore[no-any-return]


def logits_of(model: nn.Module, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **options).logits
    return logits


@torch.inference_mode()
def added(
    calls: Mapping[str, Call],
    device: torch.device,
    rounds: int,
    tolerance: float = 1e-4,
    time_of: Callable[[Call, int], float] | None = None,
) -> dict[str, float]:
    """Seconds that each of the calls adds to the base's own, by `time_of` or by the clock.

    Raises:
        AssertionError: they disagree. What computes something else may be as fast as it likes.
    """
    for name, call in calls.items():
        if name != BASE:
            torch.testing.assert_close(call(), calls[REFERENCE](), rtol=tolerance, atol=tolerance)
    taken = time_of or (lambda call, repeats: timed(call, device, repeats))
    samples = alternate({name: partial(taken, call, _REPEATS) for name, call in calls.items()}, rounds)
    return {name: samples[name].median - samples[BASE].median for name in calls if name != BASE}
