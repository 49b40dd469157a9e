"""From what a checkpoint holds to what an adapter layer has in memory: the form of its tensors, and their dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from splice.errors import AdapterMismatchError
from splice.surgery.placement import Placement


def from_file(placement: Placement, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a layer by their suffixes in memory, for those that a checkpoint holds, by their suffixes there."""
    form = placement.layer_class.file_form
    return form.from_file(tensors, placement.slots) if form.converts else dict(tensors)


def cast_whole(tensor: torch.Tensor, dtype: torch.dtype, place: str) -> torch.Tensor:
    """`tensor` in an integer dtype, where it holds whole numbers that fit in.

    Raises:
        AdapterMismatchError: it holds others; `place` says where it is.
    """
    cast = tensor.to(dtype)
    if not torch.equal(cast.to(tensor.dtype), tensor):
        raise AdapterMismatchError(
            f"{place} holds numbers that are no {dtype}, and they are indices: whole numbers are needed, which fit in. The "
            "checkpoint is damaged, or was cast to another dtype. The model is unchanged.",
            mismatched=[place],
        )
    return cast
