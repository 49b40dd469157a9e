"""Putting one adapter in the place of another, so that what was compiled with the first goes on with the second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from splice.kinds.layer import AdapterLayer, Config


class Swapping(Protocol):
    """How adapters of a method take the places of one another; in its record."""

    def check(self, old: Config, new: Config) -> None:
        """Raise where an adapter with the config `new` cannot take the place of one with `old`, whatever their tensors are.

        Raises:
            ValueError: it computes in another way.
        """
        ...

    def refusal(self, old: AdapterLayer, new: AdapterLayer | None) -> str:
        """Why `old` cannot become `new`, or nothing at all where that is None; empty if it can."""
        ...

    def put(self, old: AdapterLayer, new: AdapterLayer | None, config: Config) -> None:
        """Let `old`, of an adapter with this config, compute what `new` does, or nothing.

        Its tensors stay the same objects where they are large enough.
        """
        ...

    def cannot_grow(self, layer: AdapterLayer, rank: int) -> str:
        """Why `layer` cannot be given room for adapters up to this rank; empty if it can."""
        ...

    def grow(self, layer: AdapterLayer, rank: int | None, config: Config) -> bool:
        """Give `layer`, of an adapter with this config, room for adapters up to this rank; it computes the same.

        Its scale becomes a tensor, which compiled graphs follow.

        Returns:
            Whether it is a layer whose adapters can be exchanged at all.
        """
        ...

    def stated(self, config: Config, layers: Mapping[str, AdapterLayer]) -> dict[str, object]:
        """Values for fields of `config` with which it says what these layers, by path, hold now."""
        ...
