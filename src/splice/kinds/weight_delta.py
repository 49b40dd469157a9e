"""The kind `y + op(x, scale * update)`: an update of the weight as a whole, used through the base layer's own operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import LayerKind, kind_of, pads_with_zeros
from splice.base.weight_access import weight_shape
from splice.kinds.additive import Additive
from splice.kinds.casting import cast_to
from splice.kinds.convolution import as_convolution, convolve
from splice.kinds.layer import Config
from splice.kinds.original import original_weight
from splice.kinds.tensors import gets_gradients

# (input, weight) -> output.
Operation: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def operation_of(base: nn.Module) -> Operation:
    """What `base` computes of its input and a weight, (out, in) if it is linear; without bias."""
    # Not the base's own forward with another weight in place: that adds the bias, and other threads may be in it.
    if kind_of(base) in (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR):
        return F.linear
    if isinstance(base, nn.Embedding):
        return partial(F.embedding, padding_idx=base.padding_idx)
    conv = as_convolution(base)
    return partial(convolve(conv), stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups)


class WeightDelta(Additive):
    """The kind `y + op(x, scale * update)`, where `op` is the base layer's own operation without its bias."""

    def prepare(self, base: nn.Module, config: Config, path: str) -> None:
        self.operation = operation_of(base)
        # The operation pads with zeros; where the base does not, the update is no change of its weight.
        self.mergeable = pads_with_zeros(base)
        self.shape = weight_shape(base)

    def update(self) -> torch.Tensor:
        """The unscaled update in the shape of the dense weight: (out, in) or (out, in / groups, *kernel)."""
        raise NotImplementedError

    def dropped(self, update: torch.Tensor) -> torch.Tensor:
        """`update` as it is used in training, and in its shape, where a method drops parts of it."""
        return update

    def applied(self, x: torch.Tensor) -> torch.Tensor | None:
        """The unscaled update of a linear layer for rows `x` (rows, in): (rows, out), without the update as a whole.

        None where making that first costs less; always, of a method that knows no other way.
        """
        return None

    def directly(self, x: torch.Tensor) -> torch.Tensor | None:
        """`applied` for `x` (..., in): (..., out); None where the update has to be made, or had better be."""
        # For gradients of its tensors the whole update is made: one near zero gets another sign with its last bits, and by
        # that an optimizer that looks at signs goes another way than the one that a checkpoint was trained on.
        if len(self.shape) != 2 or gets_gradients(self):
            return None
        found = self.applied(x.reshape(-1, x.shape[-1]))
        return None if found is None else found.view(*x.shape[:-1], self.shape[0])

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        found = self.directly(x)
        if found is not None:
            return found
        update = self.dropped(self.update()) if self.training else self.update()
        return self.operation(cast_to(x, update), update)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        return self.scale * self.update()

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return x  # `delta` casts it, once it has the update


class WeightUpdate(WeightDelta):
    """The same, where the update is a function of the weight that the base layer has without adapters.

    So several add up, each of the one weight, and give merged what they give unmerged.
    """

    reads_weight = True

    def update_of(self, weight: torch.Tensor) -> torch.Tensor:
        """The unscaled update for the base's own dense `weight`, which has no graph; in its shape."""
        raise NotImplementedError

    def update(self) -> torch.Tensor:
        return self.update_of(original_weight(self.base))
