"""LoRA on torch's own attention: its input projections, which are one bare parameter, and its output projection.

Attention never calls its output projection, it reads the weight; so both updates are shown in place of the weights, or
merged into them. As the reference trains it, the output projection gets *twice* its update, W + 2 D, while the gradient
that reaches D is that of one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from splice.checkpoint.keys import format_key
from splice.errors import UnsupportedLayerError
from splice.kinds.effect import Forward
from splice.kinds.layer import AdapterLayer
from splice.kinds.names import LayerNames, Names, Place
from splice.kinds.slot import Slot
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.layers import OnLinear

_IN = "in_proj_weight"
_OUT = "out_proj"


class LoraAttention(OnLinear):
    """The update of `in_proj_weight`: A (r, dim), B (3 dim, r). Dropout has no place in it."""

    mergeable = True
    linear_layout = False
    shows = True

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        assert isinstance(base, nn.MultiheadAttention)
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
    def resolved(cls, base: nn.Module, config: LoraConfig) -> dict[str, object]:
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


class _OutNames(LayerNames):
    """The reference has wrapped the attention above, and the projection is inside what it wrapped."""

    above = True

    def key(self, path: str, suffix: str) -> str:
        return format_key(_below_base_layer(path), suffix)

    def place(self, suffix: str) -> Place:
        container, leaf = super().place(suffix)
        return Place(f"base_layer.{_OUT}.{container}", leaf)

    def nameless(self, suffix: str) -> str | None:
        place = super().nameless(suffix)
        return None if place is None else f"base_layer.{_OUT}.{place}"

    def path_in_tree(self, path: str) -> str:
        return format_key(_attention(path), "")

    def in_reference(self, path: str, suffix: str, adapter_name: str) -> str:
        return self.in_tree(path, suffix, adapter_name)

    def path_in_reference(self, path: str) -> str:
        return format_key(_below_base_layer(path), "")


class LoraOutProjection(OnLinear):
    """The update of the output projection; rank, alpha and names follow from the attention it belongs to."""

    names: Names = _OutNames()

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        return super().slots(base, config, _attention(path))

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, _attention(path))

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        delta = super().delta_weight(weight)
        # Twice the value, once the gradient: see above.
        return None if delta is None else delta + delta.detach()


def _attention(path: str) -> str:
    return path.removesuffix(f".{_OUT}")


def _below_base_layer(path: str) -> str:
    return f"{_attention(path)}.base_layer.{_OUT}"
