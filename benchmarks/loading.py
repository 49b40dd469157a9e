"""`PeftModel.from_pretrained`: one adapter onto a base that carries none."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.measure import Samples, Settings, alternate, collect_garbage, timed
from benchmarks.models import LLAMA_TARGETS, REFERENCE, SPLICE, llama, load, write_checkpoint
from benchmarks.report import Row, row

_LOW_MEMORY = f"{REFERENCE} with low_cpu_mem_usage"


def rows(settings: Settings) -> Iterator[Row]:
    """splice with its defaults, against the reference with its defaults and with `low_cpu_mem_usage=True`."""
    layers = settings.pick(32, 2)
    base = llama(layers, 512, settings.device)
    checkpoint = write_checkpoint(base, settings.folder / "loading", LLAMA_TARGETS, rank=16)
    samples = alternate(
        {
            REFERENCE: load_of(REFERENCE, base, checkpoint, settings),
            _LOW_MEMORY: load_of(REFERENCE, base, checkpoint, settings, low_cpu_mem_usage=True),
            SPLICE: load_of(SPLICE, base, checkpoint, settings),
        },
        rounds=settings.pick(11, 2),
    )
    what = f"from_pretrained, {layers * len(LLAMA_TARGETS)} targets"
    yield from _compared(what, samples[REFERENCE], samples[SPLICE])
    yield from _compared(f"{what}, low_cpu_mem_usage", samples[_LOW_MEMORY], samples[SPLICE])
    yield _fingerprint_row(base, checkpoint, settings)


def _fingerprint_row(base: nn.Module, checkpoint: Path, settings: Settings) -> Row:
    """What comparing the base costs, as a share of the load that it is part of: the two taken apart differ by less than
    one load differs from the next.
    """
    from splice.loading import load as steps

    place = settings.folder / "with a fingerprint"
    model: Any = load(SPLICE, copy.deepcopy(base), checkpoint)
    model.save_pretrained(place)
    compare, spent = steps.compare_base, []

    def timed_compare(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return compare(*arguments)
        finally:
            spent.append(time.perf_counter() - start)

    steps.compare_base = timed_compare
    try:
        candidate = load_of(SPLICE, base, place, settings)
        shares = [100 * spent[-1] / seconds for seconds in (candidate() for _ in range(settings.pick(21, 2)))]
    finally:
        steps.compare_base = compare
    return row("from_pretrained: comparing the base's fingerprint", 0, statistics.median(shares[1:]), "%").at_most(5)


def load_of(library: str, base: nn.Module, checkpoint: Path, settings: Settings, **options: Any) -> Callable[[], float]:
    def candidate() -> float:
        fresh = copy.deepcopy(base)
        collect_garbage()
        return timed(lambda: load(library, fresh, checkpoint, **options), settings.device)

    return candidate


def _compared(what: str, reference: Samples, ours: Samples) -> Iterator[Row]:
    yield row(what, reference.median * 1e3, ours.median * 1e3, "ms").at_least(12)
    yield row(f"{what}: fastest run", reference.minimum * 1e3, ours.minimum * 1e3, "ms")
