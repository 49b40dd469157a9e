"""Who uses which adapters: running calls, and graphs whose backward may still need them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence


class Held:
    """Adapters that a graph may need; they are in use as long as this lives."""

    def __init__(self, names: Sequence[str], dropped: deque[Sequence[str]]) -> None:
        self.names = names
        self.dropped = dropped

    def __del__(self) -> None:
        # No lock is taken: a graph may be freed anywhere, also while this thread holds it.
        self.dropped.append(self.names)


class Uses:
    """Which adapters are in use. Whoever asks or changes this holds the store's lock."""

    def __init__(self) -> None:
        # Adapter -> the threads of its calls, each as often as it has such.
        self.threads: dict[str, list[int]] = {}
        self._graphs: dict[str, int] = {}
        self._dropped: deque[Sequence[str]] = deque()

    def begin(self, names: Iterable[str]) -> None:
        """Note that a call of this thread uses these adapters."""
        here = threading.get_ident()
        for name in names:
            self.threads.setdefault(name, []).append(here)

    def end(self, names: Iterable[str]) -> None:
        """Note that it has ended."""
        here = threading.get_ident()
        for name in names:
            threads = self.threads[name]
            threads.remove(here)
            if not threads:
                del self.threads[name]

    def hold(self, names: Sequence[str]) -> Held:
        """Note that a graph may need these adapters, as long as the result lives."""
        for name in names:
            self._graphs[name] = self._graphs.get(name, 0) + 1
        return Held(names, self._dropped)

    def needed_by_graph(self, name: str) -> bool:
        """Whether a backward may still need the adapter."""
        while self._dropped:
            for gone in self._dropped.popleft():
                self._graphs[gone] -= 1
                if not self._graphs[gone]:
                    del self._graphs[gone]
        return name in self._graphs
