"""Adapter layers of one class as one: what is written for one adapter is computed for the stacked tensors of several.

`torch.vmap` maps it over them, so that no method has to say it twice; what broadcasts by itself needs no mapping. It pays
where the tensors of a layer are small, since they are copied, and where a call costs more for what is done for each adapter
than for the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar

import torch
from torch import nn

from splice.kinds.layer import AdapterLayer
from splice.kinds.tensors import Registered
from splice.selection import Group

# An adapter layer, and the rows of the batch that use it.
Step = tuple[AdapterLayer, Group]


class Alike:
    """The part of an adapter layer that can be computed as one with others of its class."""

    # `before` and `after`, or `around`, are what it does as a whole; they read nothing of its own but tensors, by `tensor`,
    # and what is told here, and `torch.vmap` can map them.

    # Of so many it costs less: `torch.vmap` costs a layer what seven or so small adapters cost by themselves.
    least: ClassVar[int] = 8
    # Whether they need no mapping: they give (layers, n, out) for inputs (layers, n, in), as for (n, in), with vectors of
    # (layers, 1, size) and matrices of (layers, height, width).
    broadcasts: ClassVar[bool] = False

    def likeness(self) -> Hashable:
        """What they must have in common, beside the shapes of their tensors; None where each is computed by itself."""
        raise NotImplementedError


def _likeness(layer: AdapterLayer) -> Hashable:
    return layer.likeness() if isinstance(layer, Alike) else None


class Kin:
    """Adapter layers that can be computed as one as long as they are alike, each with as many rows of a batch."""

    def __init__(self, steps: Sequence[Step]) -> None:
        """For these, which were found to be alike."""
        self.layers = [layer for layer, _ in steps]
        # Their rows, one adapter's behind another's, (layers * rows).
        self.indices = torch.cat([group.indices for _, group in steps])
        rows = [row for _, group in steps for row in group.rows]
        # How many rows there are, where these are the first ones in their order; 0 otherwise.
        self._first_rows = len(rows) if rows == list(range(len(rows))) else 0
        # Where their tensors are registered, those of one suffix behind another; and these suffixes with what is there.
        first = self.layers[0]
        self._places = [layer.registered[suffix][:2] for suffix in first.registered for layer in self.layers]
        self._slots = [(suffix, item.slot) for suffix, item in first.registered.items()]

    def write(self, tensor: torch.Tensor, what: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
        """Write to their rows of a tensor (rows of the batch, ...) `what` of each layer with its rows of the inputs."""
        found = self._compute(what, *inputs)
        if self._first_rows == len(tensor):
            tensor.copy_(found)
        else:
            tensor[self.indices] = found

    def _compute(self, what: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """`what` of each layer with its rows of these tensors (rows of the batch, ...): (layers * rows, ...)."""
        count, rows = len(self.layers), len(self.indices) // len(self.layers)
        # A backward may need them as they are, and the tensor is written to afterwards.
        whole = self._first_rows == len(inputs[0]) and not torch.is_grad_enabled()
        chosen = inputs if whole else [tensor.index_select(0, self.indices) for tensor in inputs]
        given = [tensor.reshape(count, rows, *tensor.shape[1:]) for tensor in chosen]
        tensors = self._stacked()
        if not tensors:
            return torch.cat([what(layer, *rows) for layer, *rows in zip(self.layers, *given)])
        first = self.layers[0]

        def of_one(*each: torch.Tensor) -> torch.Tensor:
            # All but its tensors is the first one's: they are alike.
            layer = object.__new__(type(first))
            own = {suffix: tensor for (suffix, _), tensor in zip(self._slots, each)}
            registered = {suffix: Registered(own, suffix, slot) for suffix, slot in self._slots}
            layer.__dict__.update(first.__dict__, registered=registered)
            return what(layer, *each[len(own) :])

        if isinstance(first, Alike) and first.broadcasts:
            wide = [tensor.unsqueeze(1) if tensor.dim() == 2 else tensor for tensor in tensors]
            found = of_one(*wide, *(tensor.flatten(1, -2) for tensor in given))
            return found.view(count * rows, *inputs[0].shape[1:-1], found.shape[-1])
        # One flat row of tensors: what `vmap` does to nested ones takes longer than its mathematics.
        return torch.vmap(of_one)(*tensors, *given).flatten(0, 1)

    def _stacked(self) -> list[torch.Tensor]:
        """Their tensors as they are now, stacked, for each suffix; none where they are not alike now."""
        count, likeness = len(self.layers), _likeness(self.layers[0])
        if likeness is None or self.layers[0].base.training or torch.compiler.is_compiling():
            return []
        found = [registry[name] for registry, name in self._places]
        alike = [_likeness(layer) for layer in self.layers].count(likeness) == count
        plain = {*map(type, found)} <= {nn.Parameter, torch.Tensor}
        if not alike or not plain or len({(t.dtype, t.device) for t in found}) > 1:
            return []
        return [torch.stack(found[start : start + count]) for start in range(0, len(found), count)]


@torch.inference_mode(False)
def find_kin(steps: Sequence[Step]) -> tuple[list[Kin], list[Step]]:
    """Those of the adapter layers and their rows that can be computed as one, and all others."""
    alike: dict[Hashable, list[Step]] = {}
    for layer, group in steps:
        # What layers share, or show in the place of the base's, is no tensor of each.
        likeness = None if layer.shows or layer.shared or layer.leaders else _likeness(layer)
        shapes = tuple((name, item.slot.shape) for name, item in layer.registered.items())
        key = group.name if likeness is None else (type(layer), likeness, shapes, len(group.rows))
        alike.setdefault(key, []).append((layer, group))
    kin, others = [], []
    for same in alike.values():
        layer = same[0][0]
        if isinstance(layer, Alike) and len(same) >= layer.least:
            kin.append(Kin(same))
        else:
            others += same
    return kin, others
