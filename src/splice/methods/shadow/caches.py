"""The cache of a shadow network, which goes along with that of the base.

Its layers stand behind the base's in the one cache that the caller has: whoever reorders its rows for a beam search, cuts it
or copies it does so to both. A class of its own around two caches would have to follow every function of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol, cast

from splice.base.caches import cache_of, length_of

# Under which a cache keeps those of shadow networks, by adapter name.
_KEPT = "splice_shadows"


class _Layered(Protocol):
    """A cache of transformers, as far as it is known here."""

    # One for each layer of a network.
    layers: list[object]
    # Whether its length is fixed.
    is_compileable: bool


class Half(NamedTuple):
    """The part of a cache that is one adapter's."""

    # The adapter's name.
    name: str
    # The cache of its shadow network; None before there is one.
    cache: object | None

    @classmethod
    def of(cls, whole: object | None, name: str) -> Half:
        """That of the adapter `name` in the cache that a network is called with.

        Raises:
            ValueError: the cache is of a fixed length, or holds tokens that the shadow network has not seen.
        """
        if whole is None:
            return cls(name, None)
        if cast(_Layered, whole).is_compileable:
            raise ValueError(
                f"a {type(whole).__name__} has no room for what the shadow network keeps; use a cache that grows (for "
                "`generate`: leave out `cache_implementation`)"
            )
        own = cast("dict[str, object]", vars(whole).get(_KEPT, {})).get(name)
        seen = length_of(own)
        if seen != length_of(whole):
            raise ValueError(
                f"the cache holds {length_of(whole)} tokens, and the shadow network of adapter {name!r} has seen {seen} of "
                "them: it was filled without the adapter. Begin with an empty cache."
            )
        return cls(name, own)

    def joined_to(self, whole: object | None) -> None:
        """Let the cache of the shadow network go along with that of the base, if there is one of each."""
        if whole is None or self.cache is None:
            return
        kept = cast("dict[str, object]", vars(whole).setdefault(_KEPT, {}))
        if kept.get(self.name) is not self.cache:
            kept[self.name] = self.cache
            cast(_Layered, whole).layers.extend(cast(_Layered, self.cache).layers)


def cache_in_output(output: object) -> object | None:
    """The cache in what a network returned, with names or without; None where there is none."""
    found = cache_of(output)
    if found is None and isinstance(output, tuple):
        found = next((item for item in cast("Iterable[object]", output) if length_of(item)), None)
    return found
