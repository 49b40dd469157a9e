"""What an update is multiplied with: a number, or a tensor that compiled graphs follow when its value changes."""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import torch

# A tensor has no dimensions. Numbers are faster, and a compiled graph is made for one value of them.
Scale: TypeAlias = float | torch.Tensor


class Rescaled:
    """What tells whether a scale may have changed: whoever sets one on a layer that computes says so."""

    # Another object each time, so that no two changes can be taken for one.
    last: ClassVar[object] = object()

    @classmethod
    def note(cls) -> None:
        """Note that a scale has been set."""
        cls.last = object()


def add_scaled(y: torch.Tensor, update: torch.Tensor, scale: Scale) -> torch.Tensor:
    """`y + scale * update`, both of one shape or such that one can be broadcast."""
    # A number is folded into the sum: one kernel instead of two. The sum is made in the wider dtype and rounded once;
    # `y + update.to(y.dtype)` would round twice. Not in a graph: of a sum with a product of two matrices, which it makes one
    # kernel of, the compiler of torch 2.13 forgets `alpha`; and one kernel is made of this as well.
    if isinstance(scale, torch.Tensor) or torch.compiler.is_compiling():
        return y + scale * update
    return torch.add(y, update, alpha=scale)
