"""Rows whose adapters only change what goes into the base layer, or what comes out: one call of the base for all of them."""

from __future__ import annotations

import torch

from splice.kinds.effect import Action, Effect
from splice.kinds.layer import AdapterLayer
from splice.kinds.row_plan import RowPlan
from splice.selection import Group


def entering(x: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """What the base layer gets in the place of `x` (rows, ..., in), which is not changed."""
    changed = [(layer, group) for layer, group in plan.steps if not layer.keeps_input]
    kin = [kin for kin in plan.kin_steps if not all(layer.keeps_input for layer in kin.layers)]
    if changed or kin:
        x = x.clone()
        for layer, group in changed:
            put(x, group, layer.before(taken(x, group)))
        for alike in kin:
            alike.write(x, _before, x)
    return x


def leaving(y: torch.Tensor, plan: RowPlan) -> None:
    """Let each row of `y` (rows, ..., out) be what its adapter makes of it, in place."""
    for layer, group in plan.steps:
        if _changes_output(layer):
            put(y, group, layer.after(taken(y, group)).to(y.dtype))
    for kin in plan.kin_steps:
        if _changes_output(kin.layers[0]):
            kin.write(y, _after, y)


def adding(y: torch.Tensor, x: torch.Tensor, plan: RowPlan) -> None:
    """The same of those that are no two steps, for what the base gave for `x` (rows, ..., in)."""
    for kin in plan.kin:
        kin.write(y, _around, x, y)


def _changes_output(layer: AdapterLayer) -> bool:
    return type(layer).after is not Effect.after and layer.action is not Action.SCALES_INPUT


def _before(layer: AdapterLayer, x: torch.Tensor) -> torch.Tensor:
    return layer.before(x)


def _after(layer: AdapterLayer, y: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = layer.after(y)
    return found.to(y.dtype)


def _around(layer: AdapterLayer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = layer.around(x, lambda _: y)
    return found.to(y.dtype)


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
