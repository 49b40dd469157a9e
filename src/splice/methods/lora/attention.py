"""LoRA on torch's own attention: its input projections, which are one bare parameter, and its output projection.

Attention never calls its output projection, it reads the weight; so both updates are shown in place of the weights, or
merged into them. As the reference trains it, the output projection gets *twice* its update, W + 2 D, while the gradient
that reaches D is that of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from splice.checkpoint.keys import PREFIX, format_key
from splice.errors import UnsupportedLayerError
from splice.kinds.layer import AdapterLayer, Forward
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.layers import LoraLinear

_IN = "in_proj_weight"
_OUT = "out_proj"


class LoraAttention(LoraLinear):
    """The update of `in_proj_weight`: A (r, dim), B (3 dim, r). Dropout has no place in it."""

    mergeable = True
    linear_layout = False
    shows = True

    @classmethod
    def slots(cls, base: Any, config: LoraConfig, path: str) -> dict[str, tuple[int, ...]]:
        if not base._qkv_same_embed_dim:
            raise UnsupportedLayerError(f"{path}: LoRA on attention needs keys and values of the dimension of queries")
        if not isinstance(base.out_proj, nn.Linear):
            kind = type(base.out_proj).__name__
            raise UnsupportedLayerError(f"{path}: LoRA on attention needs a linear out_proj, this is a {kind}")
        if config.lora_bias:
            raise UnsupportedLayerError(f"{path}: `lora_bias` is not supported on attention")
        return super().slots(base, config, path)

    @classmethod
    def companions(cls, base: nn.Module, path: str) -> dict[str, type[AdapterLayer]]:
        return {f"{path}.{_OUT}": LoraOutProjection}

    @classmethod
    def resolved(cls, base: nn.Module, config: LoraConfig) -> dict[str, Any]:
        return {}

    def wrapped(self, inner: Forward) -> Forward:
        return inner  # the host calls it with the adapted weight in place

    def shown(self, base: nn.Module) -> dict[str, torch.Tensor]:
        weight: torch.Tensor = getattr(base, _IN)
        return {_IN: weight + self.deltas({_IN: weight})[_IN].to(weight.dtype)}

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        delta = self.delta_weight(tensors[_IN])
        assert delta is not None
        return {_IN: delta}

    @property
    def changed_names(self) -> tuple[str, ...]:
        return (_IN,)


class LoraOutProjection(LoraLinear):
    """The update of the output projection; rank, alpha and names follow from the attention it belongs to."""

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, tuple[int, ...]]:
        return super().slots(base, config, _attention(path))

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, _attention(path))

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        delta = super().delta_weight(weight)
        return None if delta is None else delta + delta.detach()

    @classmethod
    def key(cls, path: str, suffix: str) -> str:
        return format_key(_below_base_layer(path), suffix)

    @classmethod
    def full_memory_name(cls, path: str, suffix: str, adapter_name: str) -> str:
        return format_key(_below_base_layer(path), cls.memory_name(suffix, adapter_name))

    def base_front(self, path: str) -> str:
        return f"{PREFIX}{_below_base_layer(path)}.{self.base_infix}"


def _attention(path: str) -> str:
    return path.removesuffix(f".{_OUT}")


def _below_base_layer(path: str) -> str:
    return f"{_attention(path)}.base_layer.{_OUT}"
