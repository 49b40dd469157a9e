"""What a checkpoint holds of an adapter layer, where that is not what the layer holds in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import torch

from splice.kinds.slot import Slot


class Stored(Protocol):
    """What a file form may ask of an adapter layer: its tensors, by suffix, that a checkpoint may hold."""

    def named_slots(self) -> Iterator[tuple[str, torch.Tensor]]: ...


class FileForm:
    """The plain form: every tensor as it is."""

    # Whether what is read is not what the layer holds, so that `slots` and `from_file` have to be asked.
    converts: ClassVar[bool] = False
    # Suffixes of tensors that no checkpoint holds as they are, and that `to_file` works others out of.
    works_with: ClassVar[frozenset[str]] = frozenset()

    def slots(self, slots: Mapping[str, Slot], config: Any) -> Mapping[str, Slot]:
        """What a checkpoint holds for a layer with these slots, by suffix."""
        return slots

    def to_file(self, layer: Stored, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that a checkpoint holds of `layer`, by suffix.

        Args:
            layer: the adapter layer.
            tensors: what it has in memory, by suffix, or what was given in the place of that; maybe not all. Of what
                `works_with` names, what was given alone.
        """
        yield from tensors.items()

    def from_file(self, tensors: Mapping[str, torch.Tensor], slots: Mapping[str, Slot]) -> dict[str, torch.Tensor]:
        """The tensors that a layer with these slots has in memory, by suffix, for those that a checkpoint holds.

        What the checkpoint has not all parts of is left out.
        """
        return dict(tensors)
