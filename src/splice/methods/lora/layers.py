"""The mathematics of LoRA: a low-rank update beside a frozen weight.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1; the rank-stabilised scale
is Kalajdzievski, arXiv 2312.03732, section 3. With A (r, in), B (out, r): `y = base(x) + s * B A x`, where
s = alpha / r, or alpha / sqrt(r).
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.asking import asked
from splice.base.layers import LayerKind, features, kind_of
from splice.kinds.additive import Additive
from splice.kinds.layer import Factors, Forward, cast_to
from splice.kinds.light_module import Slots
from splice.kinds.matching import value_for
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.inits import initialise_linear


class LoraLayer(Additive):
    """What LoRA on every kind of layer shares."""

    names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")

    @staticmethod
    def rank(config: LoraConfig, path: str) -> int:
        return int(value_for(config.rank_pattern, path, config.r))

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        rank, alpha = self.rank(config, path), value_for(config.alpha_pattern, path, config.lora_alpha)
        self.r, self.lora_alpha = rank, alpha
        self.initial_scale = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        self.scale = self.initial_scale
        self.dropout = config.lora_dropout

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        a, b = (tensors[name] for name in cls.names)
        initialise_linear(a, b, config.init_lora_weights)
        if "lora_B.bias" in tensors:
            nn.init.zeros_(tensors["lora_B.bias"])


class LoraLinear(LoraLayer):
    """LoRA on a linear layer, stored either way round."""

    lora_A: Slots
    lora_B: Slots
    # An output layer whose weight is that of the embeddings has their update: B' A' = (B A)^T.
    transposes = MappingProxyType({"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"})

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, tuple[int, ...]]:
        (size_in, size_out), r = features(base), cls.rank(config, path)
        bias: dict[str, tuple[int, ...]] = {"lora_B.bias": (size_out,)} if config.lora_bias else {}
        return {"lora_A.weight": (r, size_in), "lora_B.weight": (size_out, r), **bias}

    @classmethod
    def resolved(cls, base: nn.Module, config: LoraConfig) -> dict[str, Any]:
        # The layout follows from the layer; the field is kept as the reference writes it.
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        # Kept as a tuple: each look-up of a child module by name would cost as much as a tenth of a small product.
        first, second = self.lora_A, self.lora_B
        self._factors: tuple[Any, Any] = (first, second)
        # And what is asked for at every call, straight: in a mixed batch each step on the way is a miss of the cache.
        self._held: tuple[dict[str, Any], dict[str, Any]] = (first._parameters, second._parameters)
        has_bias = second._parameters["bias"] is not None or self._parameters["trained_bias"] is not None
        self._is_product = type(self) is LoraLinear and not has_bias

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        # The one that decoding meets on every layer: `Additive.around`, with the tensors at hand. `nn.Module.__getattr__`
        # would cost as much as a small product.
        a, b = self._held
        weight = a.get("weight")
        if type(self) is not LoraLinear or weight is None or (self.dropout and self.training):
            return super().around(x, inner)
        y: torch.Tensor = inner(x)
        hidden = F.linear(cast_to(x, weight), weight)
        out = torch.add(y, F.linear(hidden, b["weight"], b["bias"]), alpha=self.scale)
        return out if out.dtype is y.dtype else out.to(y.dtype)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self._factors[0].weight)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self._factors
        return F.linear(F.linear(x, a.weight), b.weight, b.bias)

    def factors(self) -> Factors | None:
        if not self._is_product or (self.dropout and self.training):
            return None
        a, b = self._held
        return Factors(a["weight"], b["weight"], self.scale)

    def own_update(self) -> torch.Tensor:
        """`scale * B A`, (out, in)."""
        a, b = self._factors
        return self.scale * product(b.weight, a.weight)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        return self.own_update()

    def delta_bias(self) -> torch.Tensor | None:
        bias: torch.Tensor | None = self._factors[1].bias
        return None if bias is None else self.scale * bias


class LoraEmbedding(LoraLayer):
    """LoRA on an embedding, where the first product is a look-up: `y = base(ids) + s * A^T[ids] B^T`."""

    names = ("lora_embedding_A", "lora_embedding_B")
    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, tuple[int, ...]]:
        (vocabulary, dim), r = features(base), cls.rank(config, path)
        return {"lora_embedding_A": (r, vocabulary), "lora_embedding_B": (dim, r)}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        a, b = (tensors[name] for name in cls.names)
        nn.init.normal_(b)
        if config.init_lora_weights is False:
            nn.init.normal_(a)
        else:
            nn.init.zeros_(a)

    def prepare(self, base: Any, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.dropout = 0.0  # the input is token ids
        self.look_up = (base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse)
        # Some models multiply what they look up (Gemma, BART); the update is multiplied alike.
        embed_scale = asked(base, "embed_scale")
        self.embed_scale = 1.0 if embed_scale is None else float(embed_scale)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        found = F.embedding(x, self.lora_embedding_A.T, *self.look_up) @ self.lora_embedding_B.T
        return found if self.embed_scale == 1.0 else found * self.embed_scale

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        return self.scale * product(self.lora_embedding_B, self.lora_embedding_A).T


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoraConv(LoraLinear):
    """LoRA on a convolution: a convolution to r channels, then a pointwise one with the groups of the base.

    The first one takes kernel, stride, padding and dilation of the base, and never its groups.
    """

    @classmethod
    def resolved(cls, base: nn.Module, config: LoraConfig) -> dict[str, Any]:
        return {}

    @classmethod
    def slots(cls, base: Any, config: LoraConfig, path: str) -> dict[str, tuple[int, ...]]:
        (size_in, size_out), r = features(base), cls.rank(config, path)
        if r % base.groups:
            raise ValueError(f"{path}: rank {r} must be a multiple of the convolution's groups ({base.groups})")
        ones = (1,) * len(base.kernel_size)
        bias: dict[str, tuple[int, ...]] = {"lora_B.bias": (size_out,)} if config.lora_bias else {}
        return {
            "lora_A.weight": (r, size_in, *base.kernel_size),
            "lora_B.weight": (size_out, r // base.groups, *ones),
            **bias,
        }

    def prepare(self, base: Any, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.convolve = _CONVOLUTIONS[len(base.kernel_size)]
        self.stride, self.padding, self.dilation, self.groups = base.stride, base.padding, base.dilation, base.groups
        self.mergeable = base.groups == 1 and base.padding_mode == "zeros"

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self._factors
        hidden = self.convolve(x, a.weight, None, self.stride, self.padding, self.dilation)
        return self.convolve(hidden, b.weight, b.bias, 1, 0, 1, self.groups)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        if not self.mergeable:  # the update mixes groups, or pads with zeros where the base does not
            return None
        a, b = self._factors
        return self.scale * product(b.weight.flatten(1), a.weight.flatten(1)).reshape(weight.shape)


def product(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """`B @ A`; half-precision factors on the CPU are multiplied in float32, and rounded by whoever adds the product."""
    if a.device.type == "cpu" and a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    return b @ a
