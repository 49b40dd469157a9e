"""The dropout of adapter layers as programs read it: a module for each adapter."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from splice.kinds.additive import Additive
from splice.kinds.layer import AdapterLayer


class Drops(Protocol):
    """An adapter layer that drops features in training."""

    # With this probability.
    dropout: float

    @property
    def training(self) -> bool:
        """Whether it is being trained."""
        ...


class DropoutView(nn.Dropout):
    """The dropout of an adapter layer, as a module; its `p` is that of the layer."""

    def __init__(self, layer: Drops) -> None:
        self.__dict__["layer"] = layer
        super().__init__(layer.dropout)
        self.training = layer.training

    @property
    def p(self) -> float:
        """The probability with which an input of the update is set to zero in training."""
        layer: Drops = self.__dict__["layer"]
        return layer.dropout

    @p.setter
    def p(self, value: float) -> None:
        self.__dict__["layer"].dropout = value


def dropout_of(layer: AdapterLayer) -> nn.Module | None:
    """What an adapter layer does to its input in training; None where it has no such thing."""
    if not isinstance(layer, Additive):
        return None
    return DropoutView(layer) if layer.dropout else nn.Identity()
