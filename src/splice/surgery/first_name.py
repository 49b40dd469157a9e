"""The first of the adapters' names in the order of the alphabet, without a look at all of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection


class FirstName:
    """The names of the adapters on one network, sorted.

    Args:
        names: of the adapters that are there; seen as it is at any time. Scripts take names out of it themselves.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        # Not a heap: a name that goes would stay in there, and after a load that was undone all is to be as before.
        self._sorted: list[str] = []

    def add(self, name: str) -> None:
        """Know this name too."""
        place = bisect_left(self._sorted, name)
        if self._sorted[place : place + 1] != [name]:
            self._sorted.insert(place, name)

    def forget(self, name: str) -> None:
        """Know this name no more, if it was known."""
        place = bisect_left(self._sorted, name)
        if self._sorted[place : place + 1] == [name]:
            del self._sorted[place]

    def find(self) -> str:
        """The first one.

        Raises:
            ValueError: there are no adapters.
        """
        known = next((name for name in self._sorted if name in self.names), None)
        return min(self.names) if known is None else known
