"""What the network's own rooms ask of the store: adapters that are registered, and brought in when they are used."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol


class Store(Protocol):
    """Registered adapters, by name. Those that are on the network may be evicted at any time unless somebody uses them."""

    def __contains__(self, name: object) -> bool:
        """Whether an adapter of this name is registered."""
        ...

    def using(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Inside, those of these adapters that are registered are on the network."""
        ...

    def held(self, names: Iterable[str]) -> object | None:
        """What keeps these adapters on the network as long as it lives; None where none of them is registered."""
        ...

    def keeps_from(self, name: str) -> bool:
        """Whether a new adapter cannot have this name, since a registered one has it."""
        ...

    def told(self, unknown: Iterable[str]) -> str:
        """For a message about names that are not there: how many are registered, and the nearest; with a space in front."""
        ...

    def left(self, name: str) -> None:
        """Note that an adapter was taken off the network."""
        ...

    def moved(self) -> None:
        """Note that adapters have come to be in slots, or beside them."""
        ...

    def forget(self, name: str) -> None:
        """Let an adapter be registered no more, once no running call uses it.

        Raises:
            NoRoomError: the calls that use it wait themselves.
        """
        ...
