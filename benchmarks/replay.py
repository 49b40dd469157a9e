"""Requests for 2,000 registered adapters, of which 64 fit on the model, drawn by Zipf's law: a few are asked for often.

The reference has nothing that could be put beside it: what is compared is the same requests for one adapter.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import splice
from benchmarks.measure import Settings, collect_garbage, timed
from benchmarks.models import LLAMA_TARGETS, SPLICE, llama, load, write_checkpoint
from benchmarks.report import Row, row

_RANK = 8
# Tokens of a prompt, and tokens that are generated for it.
_PROMPT, _NEW = 16, 16
# Requests that are answered together.
_ROWS = 8
# The place that an adapter has among all to this power is what divides how often it is asked for.
_EXPONENT = 1.0


@dataclass(frozen=True)
class Replay:
    """What was measured.

    Attributes:
        registered: how many adapters there are.
        slots: how many of them fit on the model.
        requests: how many were counted; those that filled the slots come before.
        hit_rate: share of requests whose adapter was on the model.
        waits: quantiles of the time until an adapter was there, in seconds, from the fastest to the slowest of 201.
        load: median of the same, of those that had to be brought in.
        tokens_per_second: that were generated, waits counted.
        single: the same for one adapter, which nobody waits for.
    """

    registered: int
    slots: int
    requests: int
    hit_rate: float
    waits: list[float]
    load: float
    tokens_per_second: float
    single: float

    def wait(self, share: float) -> float:
        """Seconds that this share of the requests waited at most for their adapter."""
        return self.waits[round(share * (len(self.waits) - 1))]


def measured(settings: Settings) -> Replay:
    """Batches of requests in turns with as many for one adapter."""
    registered, slots = settings.pick(2000, 20), settings.pick(64, 8)
    base = llama(settings.pick(4, 1), settings.pick(512, 64), settings.device)
    checkpoint = write_checkpoint(base, settings.folder / "replay", LLAMA_TARGETS, _RANK)
    single: Any = load(SPLICE, copy.deepcopy(base), checkpoint)
    model: Any = load(SPLICE, copy.deepcopy(base), checkpoint)
    model.delete_adapter("default")
    model.slots(slots, _RANK)
    model.register_adapters(_copies(checkpoint, registered))
    model.adapter_store.limits = splice.StoreLimits(device_count=slots)
    requests = _requests(registered)
    for _ in range(settings.pick(60, 4)):
        _bring(model, next(requests))
    collect_garbage()

    waits: list[float] = []
    brought = seconds = alone = 0.0
    batches = settings.pick(120, 3)
    for number in range(batches + 1):
        names = next(requests)
        before = model.adapter_store.stats()
        waited = _bring(model, names)
        after = model.adapter_store.stats()
        answer = timed(partial(_generate, model, settings, adapter_names=names), settings.device)
        other = timed(partial(_generate, single, settings), settings.device)
        if number:  # the first one fills caches
            waits += waited
            brought += after.misses + after.host_hits - before.misses - before.host_hits
            seconds, alone = seconds + sum(waited) + answer, alone + other
    waits.sort()
    tokens = batches * _ROWS * settings.pick(_NEW, 2)
    return Replay(
        registered,
        slots,
        len(waits),
        1 - brought / len(waits),
        [waits[round(index / 200 * (len(waits) - 1))] for index in range(201)],
        statistics.median(waits[len(waits) - max(int(brought), 1) :]),
        tokens / seconds,
        tokens / alone,
    )


def _copies(checkpoint: Path, count: int) -> Path:
    """A folder with so many adapters, each with a folder and files of its own, all of which share their bytes."""
    folder = checkpoint.with_name("adapters")
    for number in range(count):
        shutil.copytree(checkpoint, folder / f"adapter-{number}", copy_function=os.link)
    return folder


def _requests(count: int) -> Iterator[list[str]]:
    """Names for one batch after the other, the same in every run."""
    source = random.Random(0)
    names = [f"adapter-{number}" for number in range(count)]
    weights = [1 / place**_EXPONENT for place in range(1, count + 1)]
    while True:
        yield source.choices(names, weights, k=_ROWS)


def _bring(model: Any, names: list[str]) -> list[float]:
    """How long each of these adapters takes until it is on the model."""
    waited = []
    for name in names:
        start = time.perf_counter()
        model.adapter_store.pin(name)
        waited.append(time.perf_counter() - start)
        model.adapter_store.unpin(name)
    return waited


@torch.inference_mode()
def _generate(model: Any, settings: Settings, **options: Any) -> None:
    ids = torch.arange(_ROWS * _PROMPT, device=settings.device).view(_ROWS, _PROMPT) % 256
    new = settings.pick(_NEW, 2)
    model.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options)


def rows(found: Replay) -> Iterator[Row]:
    """What the replay found; where one adapter does the same, it stands in the place of the reference."""
    what, nothing = f"{found.registered:,} adapters over {found.slots} slots", float("nan")
    yield row(f"{what}: adapters that were there", nothing, found.hit_rate * 100, "%")
    yield row(f"{what}: time to adapter, p50", nothing, found.wait(0.5) * 1e3, "ms")
    yield row(f"{what}: time to adapter, p99", nothing, found.wait(0.99) * 1e3, "ms")
    yield row(f"{what}: time to adapter, p50 of those loaded", nothing, found.load * 1e3, "ms")
    single, ours = found.single, found.tokens_per_second
    yield Row(f"{what}: tokens a second, beside one adapter", single, ours, "tok/s", ours / single)
