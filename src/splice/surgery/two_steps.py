"""Rows whose adapters only change what goes into the base layer, or what comes out: one call of the base for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from splice.kinds.effect import Effect
from splice.kinds.row_plan import Step
from splice.selection import Group


def entering(x: torch.Tensor, steps: Sequence[Step]) -> torch.Tensor:
    """What the base layer gets in the place of `x` (rows, ..., in), which is not changed."""
    changed = [(layer, group) for layer, group in steps if not layer.keeps_input]
    if changed:
        x = x.clone()
        for layer, group in changed:
            put(x, group, layer.before(taken(x, group)))
    return x


def leaving(y: torch.Tensor, steps: Sequence[Step]) -> None:
    """Let each row of `y` (rows, ..., out) be what its adapter makes of it, in place."""
    for layer, group in steps:
        if type(layer).after is not Effect.after:
            put(y, group, layer.after(taken(y, group)).to(y.dtype))


def taken(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The rows of a group; without gradients a view where they are neighbours, which costs a fifth of a copy.

    A backward may need them as they are, and the tensor is written to afterwards.
    """
    first, last = group.rows[0], group.rows[-1]
    if last - first + 1 == len(group.rows) and not torch.is_grad_enabled():
        return tensor[first : last + 1]
    return tensor[group.indices]


def put(tensor: torch.Tensor, group: Group, rows: torch.Tensor) -> None:
    """Write the rows of a group."""
    first, last = group.rows[0], group.rows[-1]
    if last - first + 1 == len(group.rows):
        tensor[first : last + 1] = rows
    else:
        tensor[group.indices] = rows
