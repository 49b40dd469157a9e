"""The kind `y + op(x, scale * update)`: an update of the weight as a whole, used through the base layer's own operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import LayerKind, kind_of
from splice.kinds.additive import Additive
from splice.kinds.casting import cast_to

_CONVOLUTIONS = {LayerKind.CONV1D: F.conv1d, LayerKind.CONV2D: F.conv2d, LayerKind.CONV3D: F.conv3d}


def operation_of(base: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What `base` computes of its input and a weight, (out, in) if it is linear; without bias."""
    kind = kind_of(base)
    if kind in (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR):
        return F.linear
    if kind is LayerKind.EMBEDDING:
        return partial(F.embedding, padding_idx=base.padding_idx)
    assert kind is not None
    return partial(
        _CONVOLUTIONS[kind], stride=base.stride, padding=base.padding, dilation=base.dilation, groups=base.groups
    )


class WeightDelta(Additive):
    """The kind `y + op(x, scale * update)`, where `op` is the base layer's own operation without its bias."""

    def prepare(self, base: nn.Module, config: Any, path: str) -> None:
        self.operation = operation_of(base)
        # The operation pads with zeros; where the base does not, the update is no change of its weight.
        self.mergeable = vars(base).get("padding_mode", "zeros") == "zeros"
        weight = base._parameters["weight"]
        assert weight is not None
        linear = kind_of(base) is LayerKind.TRANSPOSED_LINEAR
        self.shape = tuple(weight.shape[::-1] if linear else weight.shape)

    def update(self) -> torch.Tensor:
        """The unscaled update in the shape of the dense weight, (out, in) or (out, in / groups, *kernel)."""
        raise NotImplementedError

    def dropped(self, update: torch.Tensor) -> torch.Tensor:
        """`update` as it is used in training, where a method drops parts of it."""
        return update

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        update = self.dropped(self.update()) if self.training else self.update()
        return self.operation(cast_to(x, update), update)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        return self.scale * self.update()

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return x  # `delta` casts it, once it has the update
