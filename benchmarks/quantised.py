"""LoRA on a base of 4 bits (nf4 of bitsandbytes): a load, a decode step and the peak of memory, beside the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from torch import nn

from benchmarks import memory
from benchmarks.forward import decode_row
from benchmarks.loading import load_of
from benchmarks.measure import Settings, alternate
from benchmarks.models import (
    LIBRARIES,
    LLAMA_TARGETS,
    REFERENCE,
    SPLICE,
    in_four_bits,
    linears,
    llama,
    write_checkpoint,
)
from benchmarks.report import Row, row

# The layers round what they compute to 16 bits and less, and the two libraries add to that in another order.
_TOLERANCE = 1e-3


def rows(settings: Settings) -> Iterator[Row]:
    """The same as on a plain base, with the same budgets."""
    layers = settings.pick(32, 2)
    plain = llama(layers, 512, settings.device)
    checkpoint = write_checkpoint(plain, settings.folder / "quantised", LLAMA_TARGETS, rank=16)
    base = in_four_bits(plain)
    samples = alternate(
        {library: load_of(library, base, checkpoint, settings) for library in LIBRARIES},
        rounds=settings.pick(11, 2),
    )
    what = f"from_pretrained, {layers * len(LLAMA_TARGETS)} targets in 4 bits"
    yield row(what, samples[REFERENCE].median * 1e3, samples[SPLICE].median * 1e3, "ms").at_least(12)
    stack = cast(nn.Sequential, in_four_bits(linears(settings.pick(64, 4), 128, settings.device)))
    yield decode_row(stack, settings, "decode step in 4 bits", _TOLERANCE).at_least(2.5)
    for found in memory.rows(settings, "--nf4"):
        yield replace(found, what=f"4 bits: {found.what}")
