"""DoRA: LoRA on the direction of each row of the weight, and a trained magnitude for each row.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, section 4. With D = s * B A and n(.) the norm of
every row, `W' = m / n(W + D) * (W + D)`. As in section 4.3 the norm is a constant in the backward. W is the base's own
weight in it, also where several adapters are active or merged: then each takes what the one before it gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from splice.kinds.layer import Forward
from splice.kinds.light_module import Slots
from splice.kinds.original import Original
from splice.kinds.weight_delta import operation_of
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.layers import LoraConv, LoraEmbedding, LoraLayer, LoraLinear

MAGNITUDE = "lora_magnitude_vector"


class Dora(LoraLayer):
    """What DoRA on every kind of layer shares. It stands before the LoRA layer of the kind."""

    lora_magnitude_vector: Slots
    # Whether the base has a bias, which keeps its size.
    has_bias: bool = False

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.base = Original(base)
        self.operation = operation_of(base)
        self.has_bias = base._parameters.get("bias") is not None

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        super().initialise({name: t for name, t in tensors.items() if name != MAGNITUDE}, base, config)
        magnitude = tensors[MAGNITUDE]
        magnitude.copy_(cls.sizes(Original(base).weight().to(magnitude.dtype)).reshape(magnitude.shape))

    @torch.no_grad()
    def begin(self) -> None:
        own = dict(self.named_slots())
        magnitude = own[MAGNITUDE]
        if magnitude.is_meta or not all(own[name].any() for name in self.names):
            return  # the update is zero: the magnitudes are those of the base alone, as they were initialised
        magnitude.copy_(self.norm(self.base_weight(magnitude.dtype)).reshape(magnitude.shape))

    @staticmethod
    def sizes(weight: torch.Tensor) -> torch.Tensor:
        """n(.), of as many dimensions as the weight."""
        norm: torch.Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)
        return norm

    def base_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that the magnitudes are measured on."""
        weight = self.base.weight()
        return weight if weight.dtype is dtype else weight.to(dtype)

    def total(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight + D`, both in the dtype of the adapter."""
        raise NotImplementedError

    @torch.no_grad()
    def norm(self, weight: torch.Tensor) -> torch.Tensor:
        """n(W + D), of as many dimensions as the weight."""
        return self.sizes(self.total(weight))

    def ratio(self, weight: torch.Tensor) -> torch.Tensor:
        """m / n(W + D), so shaped that it multiplies the weight."""
        norm = self.norm(weight)
        return self.lora_magnitude_vector.weight.reshape(norm.shape) / norm

    def on_output(self, tensor: torch.Tensor) -> torch.Tensor:
        """A value for every output, so shaped that it multiplies the output; it may come as `ratio` gives it."""
        return tensor.flatten()

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        y: torch.Tensor = inner(x)
        h = self.cast_input(x)
        weight = self.base_weight(self.lora_magnitude_vector.weight.dtype)
        ratio = self.on_output(self.ratio(weight))
        if self.dropout and self.training:
            h = nn.functional.dropout(h, self.dropout)
            # The part of the base in the correction sees the dropped input too, the output of the base does not.
            out = y + (ratio - 1) * self.operation(h, weight) + ratio * (self.scale * self.delta(h))
            return out.to(y.dtype)
        bias = self.base.shown("bias") if self.has_bias else None
        if bias is None:
            out = torch.add(y, self.delta(h), alpha=self.scale) * ratio
        else:
            bias = self.on_output(bias)
            out = torch.addcmul(bias.to(h.dtype), torch.add(y - bias, self.delta(h), alpha=self.scale), ratio)
        return out if out.dtype is y.dtype else out.to(y.dtype)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        plain = super().delta_weight(weight)
        if plain is None:
            return None
        ratio = self.ratio(self.base_weight(self.lora_magnitude_vector.weight.dtype))
        return ratio * (weight + plain) - weight

    def factors(self) -> None:
        return None  # the rows of the base's output are scaled too

    def attribute_of(self, suffix: str) -> str:
        return f"{MAGNITUDE}.weight" if suffix == MAGNITUDE else super().attribute_of(suffix)

    def named_slots(self) -> Any:
        for name, tensor in super().named_slots():
            yield (MAGNITUDE if name == f"{MAGNITUDE}.weight" else name), tensor

    @classmethod
    def memory_name(cls, suffix: str, adapter_name: str) -> str:
        own = f"{MAGNITUDE}.{adapter_name}.weight"
        return own if suffix == MAGNITUDE else super().memory_name(suffix, adapter_name)


class DoraLinear(Dora, LoraLinear):
    """DoRA on a linear layer, stored either way round."""

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, tuple[int, ...]]:
        plain = super().slots(base, config, path)
        return {**plain, MAGNITUDE: (plain["lora_B.weight"][0],)}

    def total(self, weight: torch.Tensor) -> torch.Tensor:
        a, b = self._factors
        return torch.addmm(weight, b.weight, a.weight, alpha=self.scale)


class DoraEmbedding(Dora, LoraEmbedding):
    """DoRA on an embedding: a magnitude for every column of its table."""

    @staticmethod
    def sizes(weight: torch.Tensor) -> torch.Tensor:
        norm: torch.Tensor = torch.linalg.vector_norm(weight, dim=0, keepdim=True)
        return norm

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, tuple[int, ...]]:
        plain = super().slots(base, config, path)
        return {**plain, MAGNITUDE: (plain["lora_embedding_B"][0],)}

    def total(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.addmm(weight, self.lora_embedding_A.T, self.lora_embedding_B.T, alpha=self.scale)


class DoraConv(Dora, LoraConv):
    """DoRA on a convolution: a magnitude for every output channel."""

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, tuple[int, ...]]:
        plain = super().slots(base, config, path)
        ones = (1,) * (len(plain["lora_B.weight"]) - 2)
        return {**plain, MAGNITUDE: (1, plain["lora_B.weight"][0], *ones)}

    def total(self, weight: torch.Tensor) -> torch.Tensor:
        a, b = self._factors
        # With groups this product mixes them, and is not what the layer adds: the reference trains with it all the same.
        product = b.weight.reshape(-1, self.r) @ a.weight.reshape(self.r, -1)
        return torch.add(weight, product.reshape(weight.shape), alpha=self.scale)

    def on_output(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1, *(1,) * len(self.stride))
