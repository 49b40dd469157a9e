"""What a store has done so far."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from splice.errors import counted, sized

# Loads whose times are kept.
_KEPT = 4096


class StoreStats(NamedTuple):
    """`str(stats)` is three lines for people.

    Attributes:
        registered: how many adapters are registered.
        on_device: how many of them are on the model.
        device_bytes: bytes that these take, those in slots left out.
        in_host: how many are kept in host memory.
        host_bytes: bytes that these take.
        hits: how often an adapter was on the model when it was asked for.
        host_hits: how often it was in host memory.
        misses: how often it had to be read from its file.
        evictions: how many were taken off the model, for others or by `evict`.
        host_evictions: how many were dropped from host memory for others.
        loads: how many were put on the model, by calls and by `prefetch`.
        load_p50: seconds that half of the last 4,096 loads took at most; nan before the first.
        load_p99: seconds that 99 % of them took at most.
    """

    registered: int
    on_device: int
    device_bytes: int
    in_host: int
    host_bytes: int
    hits: int
    host_hits: int
    misses: int
    evictions: int
    host_evictions: int
    loads: int
    load_p50: float
    load_p99: float

    def __str__(self) -> str:
        asked = self.hits + self.host_hits + self.misses
        share = f" ({self.hits / asked:.0%})" if asked else ""
        times = f", p50 {self.load_p50 * 1000:.1f} ms, p99 {self.load_p99 * 1000:.1f} ms" if self.loads else ""
        return (
            f"{counted(self.registered, 'adapter')} registered: {self.on_device} on the model, {sized(self.device_bytes)}; "
            f"{self.in_host} in host memory, {sized(self.host_bytes)}\n"
            f"  asked for {counted(asked, 'time')}: {self.hits} on the model{share}, {self.host_hits} in host memory, "
            f"{self.misses} on disk\n"
            f"  {counted(self.loads, 'load')}{times}; evicted: {self.evictions} from the model, {self.host_evictions} from "
            "host memory"
        )


class Counters:
    """Numbers that only grow, and the times of the last loads."""

    def __init__(self) -> None:
        self.hits = self.host_hits = self.misses = self.evictions = self.host_evictions = self.loads = 0
        self._seconds: deque[float] = deque(maxlen=_KEPT)

    def loaded(self, seconds: float) -> None:
        """Note a load that took so long."""
        self.loads += 1
        self._seconds.append(seconds)

    def quantile(self, share: float) -> float:
        """Seconds that this share of the last loads took at most."""
        ordered = sorted(self._seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
