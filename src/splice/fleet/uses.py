"""Who uses which adapters: running calls, and graphs whose backward may still need them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol
from weakref import WeakSet


class Keeps(Protocol):
    """What brings adapters in for a call: the store."""

    def begin(self, use: Use) -> None:
        """Have the adapters on the model, and note that the call uses them."""
        ...

    def end(self, use: Use) -> None:
        """Note that the call has ended."""
        ...


class Use:
    """Inside, a call uses adapters. A class of its own, since a generator would double what most calls pay."""

    def __init__(self, store: Keeps, names: Sequence[str]) -> None:
        self._store, self.names = store, names
        self.thread = threading.get_ident()

    def __enter__(self) -> None:
        try:
            self._store.begin(self)
        except BaseException:  # an interrupt, mostly: a use that nobody ends would keep the adapters for ever
            self._store.end(self)
            raise

    def __exit__(self, *error: object) -> None:
        self._store.end(self)


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
        # Adapter -> its calls, those of them that are still there: one whose end was interrupted is not.
        self._calls: dict[str, WeakSet[Use]] = {}
        self._graphs: dict[str, int] = {}
        self._dropped: deque[Sequence[str]] = deque()

    def begin(self, use: Use) -> None:
        """Note that a call uses adapters."""
        for name in use.names:
            calls = self._calls.get(name)
            if calls is None:
                calls = self._calls[name] = WeakSet()
            calls.add(use)

    def end(self, use: Use) -> None:
        """Note that it has ended, also where `begin` was cut short."""
        for name in use.names:
            calls = self._calls.get(name)
            if calls is not None:
                calls.discard(use)

    def __contains__(self, name: str) -> bool:
        """Whether a running call uses the adapter."""
        return bool(self._calls.get(name))

    def forget(self, name: str) -> None:
        """Know nothing of an adapter that is not on the model any more."""
        self._calls.pop(name, None)

    def threads(self, names: Iterable[str]) -> set[int]:
        """The threads of the calls that use any of these adapters."""
        return {use.thread for name in names for use in self._calls.get(name, ())}

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
