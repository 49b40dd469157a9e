"""Tensors that are made of those of another checkpoint whenever they are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from splice.base.sharding import Part, part_in


class Derived(ABC):
    """What follows from `read`, of `Weights` that read something else: nothing of it is in a file as it is."""

    # Those that are passed on as they are may be.
    lends = True

    @abstractmethod
    def read(self, names: Sequence[str], into: Mapping[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
        """These tensors, each in memory of its own."""

    def read_part(self, name: str, part: Part) -> torch.Tensor:
        """The part of one of them."""
        return part_in(self.read([name])[0], part)

    def says(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether one of them is this `tensor`, to the last bit."""
        (own,) = self.read([name])
        return own.dtype is tensor.dtype and torch.equal(own, tensor)
