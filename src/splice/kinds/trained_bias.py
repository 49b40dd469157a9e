"""A trained bias of a base layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from splice.kinds.layer import AdapterLayer, Forward


class BiasOnly(AdapterLayer):
    """A trained bias on a module that is no target otherwise (`bias="all"`)."""

    base_infix = ""
    mergeable = True

    @classmethod
    def slots(cls, base: nn.Module, config: Any, path: str) -> dict[str, tuple[int, ...]]:
        bias = base._parameters["bias"]
        assert bias is not None
        return {"bias": tuple(bias.shape)}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: Any) -> None:
        copy_bias(tensors["bias"], base)

    def wrapped(self, inner: Forward) -> Forward:
        return inner  # the host calls it with the trained bias in place

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}

    @property
    def changed_names(self) -> tuple[str, ...]:
        return ()

    def named_slots(self) -> Iterator[tuple[str, torch.Tensor]]:
        assert self.trained_bias is not None
        yield "bias", self.trained_bias

    def attribute_of(self, suffix: str) -> str:
        return "trained_bias"

    @classmethod
    def memory_name(cls, suffix: str, adapter_name: str) -> str:
        return suffix


def copy_bias(tensor: torch.Tensor, base: nn.Module) -> None:
    """Start a trained bias from the base's own."""
    bias = base._parameters["bias"]
    assert bias is not None
    tensor.copy_(bias.detach())
