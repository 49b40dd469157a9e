"""A forward that somebody puts in the place of an adapted network's own: what acts on its call goes around that one too.

trl does it to the base model after an adapter was put on it (a loss that never holds all logits), and so do accelerate's
hooks. Adapters on layers are reached from any forward. Those on the call of the network would be stepped around.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, MethodType
from typing import Protocol, cast

import torch
from torch import nn

from splice.kinds.computing import computing, reading_as
from splice.kinds.effect import Forward
from splice.kinds.host import Host, host_of
from splice.kinds.network import NetworkLayer

# What a network reads as its own tensors while a replaced forward of it runs: nothing else than ever. It is this object and
# no other empty one, so that the forward which was there before can tell from where it is called.
IN_REPLACED: Mapping[str, torch.Tensor] = MappingProxyType({})


class Around(Protocol):
    """An adapted layer, as far as this file knows it."""

    def forward(self, *args: object, **kwargs: object) -> object:
        """Its own forward."""
        ...

    def forward_around(self, run: Forward, *args: object, **kwargs: object) -> object:
        """What the selected adapters give around `run`."""
        ...


class ReplacedForward:
    """A forward with adapters around it that were there first; `layer.forward` of a network that they act on."""

    # An object and no closure, so that a copy of the network gets one of its own.

    def __init__(self, layer: Around, function: Forward) -> None:
        self.layer = layer
        # By this name `inspect.signature` finds what the forward takes.
        self.__wrapped__ = function

    def __call__(self, *args: object, **kwargs: object) -> object:
        host = host_of(cast("nn.Module", self.layer))
        # Of several that were put one over the other, the outermost is called first.
        if host is None or running(host) is not None:
            return self.__wrapped__(*args, **kwargs)
        with reading_as(host, IN_REPLACED):
            return self.layer.forward_around(self.__wrapped__, *args, **kwargs)


def running(host: Host) -> Mapping[str, torch.Tensor] | None:
    """What stands in for tensors of the layer in the forward of it that this thread is in the middle of; None for none."""
    for of, tensors in reversed(computing.stack):
        if of is host:
            return tensors
    return None


def around_replaced(layer: Around, host: Host | None, value: object) -> object:
    """What has to stand as `layer.forward` where somebody puts `value` there."""
    layers = () if host is None else host.layers.values()
    acts_on_call = any(isinstance(adapter, NetworkLayer) for adapter in layers)
    own = isinstance(value, MethodType) and value.__self__ is layer and value.__func__ is type(layer).forward
    if not acts_on_call or own or isinstance(value, ReplacedForward) or not callable(value):
        return value
    return ReplacedForward(layer, value)
