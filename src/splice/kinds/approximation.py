"""What an adapter does to weights, handed to another method that comes as near to it as it can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import nn

from splice.config import PeftConfig
from splice.kinds.module_copy import WholeModule


class Update(NamedTuple):
    """What an adapter adds to the weight of one layer."""

    # The layer.
    base: nn.Module
    # Works the update out: in the shape of the dense weight, (out, in) of linear layers, in float32 at least.
    work_out: Callable[[], torch.Tensor]


class Source(NamedTuple):
    """An adapter, as far as another one is to take its place."""

    # The network that it is on.
    network: nn.Module
    # Its config.
    config: PeftConfig
    # Path -> what it adds there.
    updates: Mapping[str, Update]
    # Path -> a module that it saves whole.
    copies: Mapping[str, WholeModule]


class Wanted(NamedTuple):
    """How near it is to come: one of both."""

    # The rank of every layer; None for as small a one as `error` allows.
    rank: int | None
    # The largest error of a layer's update, relative to its norm (Frobenius); None for what `rank` gives.
    error: float | None


class Approximated(NamedTuple):
    """One layer of the new adapter."""

    # The layer's path.
    path: str
    # The rank that it got; 0 where there is nothing to add.
    rank: int
    # The norm of the update that it stands for (Frobenius).
    norm: float
    # That of the difference to it, relative to the norm.
    error: float
    # The tensors of the new adapter, under their names in a checkpoint.
    tensors: Mapping[str, torch.Tensor]


class Approximation(Protocol):
    """A method's way to take the place of adapters of other methods."""

    def layers(self, source: Source, wanted: Wanted) -> Iterator[Approximated]:
        """The layers of the new adapter, each worked out when it is asked for.

        Raises:
            UnsupportedFeatureError: the method cannot be put on one of the layers; raised before the first is worked out.
        """
        ...

    def config(self, source: Source, layers: Mapping[str, Approximated]) -> PeftConfig:
        """The config of the new adapter, of the layers that have been worked out, by path."""
        ...
