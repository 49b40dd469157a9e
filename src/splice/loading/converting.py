"""From what a checkpoint holds to what an adapter layer has in memory: the form of its tensors, and their dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from splice.errors import AdapterMismatchError
from splice.kinds.slot import Slot
from splice.surgery.placement import Placement


def from_file(placement: Placement, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a layer by their suffixes in memory, for those that a checkpoint holds, by their suffixes there."""
    form = placement.layer_class.file_form
    return form.from_file(tensors, placement.slots) if form.converts else dict(tensors)


def indices(tensor: torch.Tensor, slot: Slot, dtype: torch.dtype, place: str) -> torch.Tensor:
    """`tensor` in the integer dtype of its slot, where it holds whole numbers that fit in and that there is something for.

    Raises:
        AdapterMismatchError: it holds others; `place` says where it is.
    """
    cast = tensor.to(dtype)
    if cast is not tensor and not torch.equal(cast.to(tensor.dtype), tensor):
        raise AdapterMismatchError(
            f"{place} holds numbers that are no {dtype}, and they are indices: whole numbers are needed, which fit in. The "
            "checkpoint is damaged, or was cast to another dtype. The model is unchanged.",
            mismatched=[place],
        )
    # All of one process's: what each process has a part of is no indices.
    for row, count in zip([cast] if len(slot.choices) == 1 else cast, slot.choices):
        if row.numel() and not 0 <= int(row.min()) <= int(row.max()) < count:
            raise AdapterMismatchError(
                f"{place} holds indices from {int(row.min())} to {int(row.max())}, and there are {count} to choose from, "
                "counted from 0: the checkpoint is damaged, or for another base or config. The model is unchanged.",
                mismatched=[place],
            )
    return cast
