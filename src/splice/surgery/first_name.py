"""The first of the adapters' names in the order of the alphabet, without a look at all of them."""

from __future__ import annotations

from collections.abc import Collection
from heapq import heapify, heappop, heappush

# How many names may be kept beside twice those that are there.
_SPARE = 16


class FirstName:
    """The names of the adapters on one network. Those that have gone are dropped when they come first, or are too many.

    Args:
        names: of the adapters that are there; seen as it is at any time.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        # A heap. A name may be in it several times, or be there no more.
        self._known: list[str] = []

    def add(self, name: str) -> None:
        """Know this name too, which is among `names` by now."""
        heappush(self._known, name)
        if len(self._known) > 2 * len(self.names) + _SPARE:
            self._known = list(self.names)
            heapify(self._known)

    def find(self) -> str:
        """The first one.

        Raises:
            ValueError: there are no adapters.
        """
        while self._known and self._known[0] not in self.names:
            heappop(self._known)
        return self._known[0] if self._known else min(self.names)
