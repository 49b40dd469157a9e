"""The kind that makes another weight of the one that the layer has: `y + op(x, transformed(W) - W)`."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import pads_with_zeros
from splice.base.weight_access import bias_of
from splice.kinds.convolution import Convolution, as_convolution, convolve
from splice.kinds.effect import Action
from splice.kinds.host import host_of, in_order
from splice.kinds.layer import Config
from splice.kinds.original import original_weight
from splice.kinds.weight_delta import Operation, WeightDelta


class WeightTransform(WeightDelta):
    """The kind `y + op(x, transformed(W) - W)`, with W the weight as those of several adapters that come first make it.

    So several give what they give merged, one after the other. Where the transform is one of the layer's input or output,
    these kinds say the same without a weight.
    """

    reads_weight = True
    action = Action.OTHER

    def prepare(self, base: nn.Module, config: Config, path: str) -> None:
        super().prepare(base, config, path)
        if not pads_with_zeros(base):  # it changes the weight that the base has, which pads in this way
            self.operation, self.mergeable = _padding_as(as_convolution(base)), True

    def transformed(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight in the place of `weight`, (out, in) or (out, in / groups, *kernel), in its dtype or a wider one."""
        raise NotImplementedError

    def update(self) -> torch.Tensor:
        return self.delta_weight(self._weight_inside())

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return self.transformed(weight) - weight

    def _weight_inside(self) -> torch.Tensor:
        """The base's weight with all adapters that take effect before this one, merged or not."""
        weight, host = original_weight(self.base), host_of(self.base)
        if host is None:
            return weight
        choice = host.selection.current()
        active = [] if choice.rows is not None else in_order(host.layers, choice.names)
        bias = bias_of(host.base)
        for name in dict.fromkeys([*host.merged, *active]):
            adapter = host.layers[name]
            if adapter is self:
                break
            if adapter.mergeable:
                seen = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
                weight = weight + adapter.deltas(seen).get("weight", 0.0)
        return weight


def _padding_as(base: Convolution) -> Operation:
    """What a convolution that pads with something else than zeros computes of its input and a weight; without bias."""
    operation = partial(convolve(base), stride=base.stride, dilation=base.dilation, groups=base.groups)
    return partial(_padded, operation, base._reversed_padding_repeated_twice, base.padding_mode)


def _padded(operation: Operation, sizes: list[int], mode: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return operation(F.pad(x, sizes, mode=mode), weight)
