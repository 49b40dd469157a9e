"""What a checkpoint holds of an adapter layer, where that is not what the layer holds in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch


class Stored(Protocol):
    """What a file form asks of an adapter layer: its tensors, by suffix, that a checkpoint may hold."""

    def named_slots(self) -> Iterator[tuple[str, torch.Tensor]]: ...


class FileForm:
    """The plain form: every tensor as it is."""

    def to_file(self, layer: Stored) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that a checkpoint holds of `layer`, by suffix."""
        return layer.named_slots()
