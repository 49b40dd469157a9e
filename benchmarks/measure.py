"""How things are timed: settings of a run, samples, and rounds in which the candidates take turns."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run.

    Attributes:
        folder: a temporary folder, for checkpoints.
        device: where models and inputs are.
        small: only show that everything works; the figures mean nothing.
    """

    folder: Path
    device: torch.device
    small: bool

    def pick(self, full: int, small: int) -> int:
        """A size or a number of rounds, for a full and for a small run."""
        return small if self.small else full


@dataclass(frozen=True)
class Samples:
    """Times of the same thing, in seconds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)


def alternate(candidates: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Samples]:
    """Let the candidates take turns, so that whatever else the machine does meets all of them alike.

    Each candidate times itself and gives seconds: what it prepares is not counted. A first round, which imports and
    fills caches, is thrown away. Of more than two, each round has another order: what one leaves in caches and in the
    allocator meets each of the others as often.
    """
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(0).shuffle
    for _ in range(rounds + 1):
        for name in order:
            taken[name].append(candidates[name]())
        if len(order) > 2:
            shuffle(order)
    return {name: Samples(seconds[1:]) for name, seconds in taken.items()}


def timed(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds that one of `repeats` calls takes, with all that it started on the device."""
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronise(device)
    return (time.perf_counter() - start) / repeats


def processor_time(call: Callable[[], object], repeats: int = 1) -> float:
    """Seconds that the processor spends on one of `repeats` calls on the CPU, whatever else the machine does meanwhile."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def collect_garbage() -> None:
    """Leave nothing of the last measurement for a collection to find in the next one."""
    gc.collect()


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread: hand-overs between threads would drown differences of microseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
