"""How the tensors of SHADOW are called. In its files stands "default", whatever the adapter is called."""

from __future__ import annotations

from splice.checkpoint.keys import format_key
from splice.kinds.names import LayerNames, Place, SharedNames

# What stands in files where the adapter's name stands in memory.
MARK = ".default."


def _place(suffix: str) -> Place:
    container, _, leaf = suffix.partition(MARK)
    return Place(container, leaf)


class BlockNames(LayerNames):
    """Of tensors on blocks."""

    def place(self, suffix: str) -> Place:
        return _place(suffix)


class ShadowNames(SharedNames):
    """Of the shadow network, which all blocks share."""

    def place(self, suffix: str) -> Place:
        return _place(suffix)

    def base_in_reference(self, path: str) -> str:
        return format_key(path, "")
