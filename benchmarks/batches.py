"""A batch whose rows share 1, 8 or 32 adapters, beside the same batch through a single adapter that is merged."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.forward import SLOTS, Call, logits_of, with_adapters
from benchmarks.measure import Settings, alternate, timed
from benchmarks.models import LLAMA_TARGETS, REFERENCE, SPLICE, llama, load, write_checkpoint
from benchmarks.report import Row, row
from splice.errors import counted

# One adapter in the weights, which costs what the base does.
MERGED = "merged"
WAYS = {MERGED: "one adapter, merged", REFERENCE: "reference", SPLICE: "splice", SLOTS: "splice, in slots"}
# How many adapters the rows share; there are as many rows as the last.
_ADAPTERS = (1, 8, 32)
_TOKENS = (1, 64)
_RANK = 16


@dataclass(frozen=True)
class Batch:
    """What a call takes.

    Attributes:
        rows: of the batch.
        adapters: how many different ones the rows have.
        tokens: of each row.
        seconds: by the `WAYS`.
    """

    rows: int
    adapters: int
    tokens: int
    seconds: dict[str, float]


def measured(settings: Settings) -> Iterator[Batch]:
    """All ways in turns, for each number of adapters and of tokens.

    Raises:
        AssertionError: they do not compute the same. All adapters have the same values, in memory of their own.
    """
    base = llama(settings.pick(4, 1), settings.pick(512, 64), settings.device)
    checkpoint = write_checkpoint(base, settings.folder / "batches", LLAMA_TARGETS, _RANK)
    count = settings.pick(_ADAPTERS[-1], 4)
    merged: Any = load(SPLICE, copy.deepcopy(base), checkpoint)
    merged.merge_adapter()
    for adapters in (1, 2, 4) if settings.small else _ADAPTERS:
        names = [f"adapter-{number}" for number in range(adapters)]
        of_rows = [names[number % adapters] for number in range(count)]
        models: dict[str, Any] = {
            way: with_adapters(REFERENCE if way == REFERENCE else SPLICE, base, checkpoint, names)
            for way in (REFERENCE, SPLICE, SLOTS)
        }
        models[SLOTS].slots(count, _RANK)
        for tokens in (1, 3) if settings.small else _TOKENS:
            ids = torch.arange(count * tokens, device=settings.device).view(count, tokens) % 256
            calls: dict[str, Call] = {MERGED: partial(logits_of, merged, ids)}
            calls |= {way: partial(logits_of, model, ids, adapter_names=of_rows) for way, model in models.items()}
            yield Batch(count, adapters, tokens, _timed(calls, settings.pick(30 if tokens == 1 else 12, 2), settings))


@torch.inference_mode()
def _timed(calls: Mapping[str, Call], rounds: int, settings: Settings) -> dict[str, float]:
    """Seconds of each call, which all compute the same."""
    for call in calls.values():
        torch.testing.assert_close(call(), calls[MERGED](), rtol=1e-3, atol=1e-3)
    turns = {way: partial(timed, call, settings.device) for way, call in calls.items()}
    return {way: samples.median for way, samples in alternate(turns, rounds).items()}


def rows(found: list[Batch]) -> Iterator[Row]:
    """What a call takes without and with slots, and how much longer that is than with one merged adapter."""
    for batch in found:
        adapters, tokens = counted(batch.adapters, "adapter"), counted(batch.tokens, "token")
        what, seconds = f"batch of {batch.rows} rows, {adapters}, {tokens} each", batch.seconds
        yield row(what, seconds[REFERENCE] * 1e3, seconds[SPLICE] * 1e3, "ms")
        yield row(f"{what}: in slots", seconds[REFERENCE] * 1e3, seconds[SLOTS] * 1e3, "ms")
        beside = seconds[MERGED]
        yield row("- in times of one merged adapter", seconds[REFERENCE] / beside, seconds[SLOTS] / beside, "x")
