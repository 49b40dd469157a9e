"""The place of one tensor in an adapter layer: what is known of it before there is a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

import torch


class Role(Enum):
    """What a tensor is to whoever trains the model."""

    TRAINED = "a parameter that is trained where its adapter is"
    FIXED = "a parameter that is never trained: the reference registers a number or two so"
    BUFFER = "a buffer: never trained, and not among the parameters"


# As a dimension of a slot: what the checkpoint has.
ANY = -1


class Slot(NamedTuple):
    """One tensor that an adapter layer has. Nothing is allocated; hundreds of slots are made for a load."""

    # Of the tensor, in memory and in a checkpoint alike; `ANY` where only a checkpoint's tensor tells a dimension.
    shape: tuple[int, ...]
    # Whether it is trained.
    role: Role = Role.TRAINED
    # Whether a checkpoint holds it; if not, the layer works it out itself.
    stored: bool = True
    # In memory. None for that of the adapter: the base's, or float32 where the base is in half precision.
    dtype: torch.dtype | None = None
    # Of a buffer that a checkpoint holds: whether the state dict of no module has it. The reference has it in no module.
    hidden: bool = False
    # Of indices: how many things there are to choose from, for each row of the tensor or one number for all of it.
    choices: tuple[int, ...] = ()

    @property
    def persistent(self) -> bool:
        """Whether the state dict of the module has it, of a buffer."""
        return self.stored and not self.hidden

    @property
    def drawn_in(self) -> torch.dtype:
        """The dtype that a new adapter's values are drawn in: float32, or that of the slot where it holds no floats."""
        return torch.float32 if self.dtype is None or self.dtype.is_floating_point else self.dtype

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape fits."""
        return len(shape) == len(self.shape) and all(own in (ANY, size) for own, size in zip(self.shape, shape))


class Leader(NamedTuple):
    """Whose tensor stands in a slot, where it is that of another layer of the same adapter: the two share it."""

    # The path of that layer.
    path: str
    # The suffix of the tensor there.
    suffix: str
    # Whether it is the transpose of the one there.
    transposed: bool = False


def shapes_of(slots: Mapping[str, Slot]) -> dict[str, tuple[int, ...]]:
    """The shapes of those that a checkpoint holds, by suffix."""
    return {suffix: slot.shape for suffix, slot in slots.items() if slot.stored}


def fit(slots: Mapping[str, Slot], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether tensors of these shapes, by suffix, are all that a checkpoint holds for the slots."""
    stored = {suffix: slot for suffix, slot in slots.items() if slot.stored}
    return shapes.keys() == stored.keys() and all(slot.takes(shapes[suffix]) for suffix, slot in stored.items())
