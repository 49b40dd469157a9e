"""A trained bias in the place of a base layer's own, on a module that is no target otherwise (`bias="all"`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from splice.config import PeftConfig
from splice.kinds.effect import Forward
from splice.kinds.layer import AdapterLayer
from splice.kinds.names import LayerNames, Names
from splice.kinds.slot import Slot

_SUFFIX = "bias"


class _BiasNames(LayerNames):
    """The reference trains the base's own bias, so it stands in the place of that one, under its name."""

    def nameless(self, suffix: str) -> str | None:
        return _SUFFIX


class BiasOnly(AdapterLayer):
    """The bias alone."""

    names: Names = _BiasNames("")
    mergeable = True
    # Shown and not added to the output: a layer may use its bias in another way, or read it without calling anything.
    shows = True

    @classmethod
    def slots(cls, base: nn.Module, config: PeftConfig, path: str) -> dict[str, Slot]:
        return {_SUFFIX: bias_slot(base)}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: PeftConfig) -> None:
        copy_bias(tensors[_SUFFIX], base)

    @property
    def trained_bias(self) -> torch.Tensor | None:
        return self.tensor(_SUFFIX)

    def wrapped(self, inner: Forward) -> Forward:
        return inner  # the host calls it with the trained bias in place

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}

    @property
    def changed_names(self) -> tuple[str, ...]:
        return ()


def bias_slot(base: nn.Module) -> Slot:
    """The slot of a trained bias of `base`: as the base's own, whatever the adapter's other tensors are."""
    bias = base._parameters["bias"]
    assert bias is not None  # the plan asks only for layers that have one
    return Slot(tuple(bias.shape), dtype=bias.dtype)


def copy_bias(tensor: torch.Tensor, base: nn.Module) -> None:
    """Start a trained bias from the base's own."""
    bias = base._parameters["bias"]
    assert bias is not None
    tensor.copy_(bias.detach())
