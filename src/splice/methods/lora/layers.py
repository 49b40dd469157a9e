"""The mathematics of LoRA: a low-rank update beside a frozen weight.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1; the rank-stabilised scale
is Kalajdzievski, arXiv 2312.03732, section 3. With A (r, in), B (out, r): `y = base(x) + s * B A x`, where
s = alpha / r, or alpha / sqrt(r).

`LowRank` is what every relative of LoRA builds on, once for each kind of base layer: `OnLinear`, `OnEmbedding`,
`OnConvolution`. A relative supplies a part of it, such as how A is applied; none of them builds on another's layer.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.foreign_models import embed_scale
from splice.base.layers import LayerKind, features, kernel_size, kind_of, pads_with_zeros
from splice.errors import UnsupportedFeatureError
from splice.kinds.additive import Additive
from splice.kinds.casting import cast_to
from splice.kinds.convolution import as_convolution, convolve
from splice.kinds.effect import Factors, Forward, note_rescaled
from splice.kinds.matching import value_for
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held, Registry
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.inits import LORA_GA, initialise_linear

_is_compiling = torch.compiler.is_compiling


class LowRank(Additive):
    """A low-rank update: rank, scale and how the factors start."""

    numbers = MappingProxyType({**Additive.numbers, "lora_alpha": "lora_alpha"})
    # Suffixes of A and B.
    factor_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    # A and B as they are now.
    a = Held("lora_A.weight")
    b = Held("lora_B.weight")
    # The rank, at least 1, and the numerator of the scale.
    r: int
    lora_alpha: float
    initial_scale: float

    @staticmethod
    def rank(config: LoraConfig, path: str) -> int:
        """The rank that the config gives to the layer at `path`."""
        return value_for(config.rank_pattern, path, config.r)

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        rank, alpha = self.rank(config, path), value_for(config.alpha_pattern, path, config.lora_alpha)
        self.r, self.lora_alpha = rank, alpha
        self.initial_scale = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        self.scale = self.initial_scale
        self.dropout = config.lora_dropout

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        a, b = (tensors[name] for name in cls.factor_names)
        initialise_linear(a, b, config.init_lora_weights)
        if "lora_B.bias" in tensors:
            nn.init.zeros_(tensors["lora_B.bias"])

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """A applied to `x` (..., in), token ids (...) on an embedding: (..., r)."""
        raise NotImplementedError

    def up(self, hidden: torch.Tensor) -> torch.Tensor:
        """B applied to `hidden` (..., r), what `down` gave: (..., out)."""
        raise NotImplementedError

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))

    def weighted(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # In between, where a token has r features and not as many as come out.
        return self.scale * self.up(self.down(x) * weights.to(self.a.dtype))

    def plain(self) -> Factors:
        """A and B, of their own shapes, with which plain LoRA of this scale computes what this layer does, but for a bias.

        Raises:
            UnsupportedFeatureError: no plain LoRA does.
        """
        return Factors(self.a, self.b, float(self.scale))

    def delta_bias(self) -> torch.Tensor | None:
        bias = self.find("lora_B.bias")
        return None if bias is None else self.scale * bias

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.a)


class OnLinear(LowRank):
    """On a linear layer, stored either way round."""

    # An output layer whose weight is that of the embeddings has their update: B' A' = (B A)^T.
    transposes = MappingProxyType({"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"})

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        (size_in, size_out), r = features(base), cls.rank(config, path)
        found = {"lora_A.weight": Slot((r, size_in)), "lora_B.weight": Slot((size_out, r))}
        return {**found, "lora_B.bias": Slot((size_out,))} if config.lora_bias else found

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        if config.init_lora_weights == LORA_GA:
            raise UnsupportedFeatureError(
                "init_lora_weights='lora_ga' starts a new adapter from gradients of the base's weights, and this model has "
                "none: run `preprocess_loraga(model, config, train_step)` first."
            )
        super().initialise(tensors, base, config)

    @classmethod
    def resolved(cls, base: nn.Module, config: LoraConfig) -> dict[str, object]:
        # The layout follows from the layer; the field is kept as the reference writes it.
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    def down(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.a)

    def up(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.b, self.find("lora_B.bias"))

    def own_update(self) -> torch.Tensor:
        """`scale * B A`, (out, in)."""
        update = product(self.b, self.a)
        # In place where nobody asks for gradients: it is as large as the weight.
        return self.scale * update if update.requires_grad else update.mul_(self.scale)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        return self.own_update()


class TellsScale(LowRank):
    """The scale of a layer whose products are worked out with those of others: whoever keeps it is told of another one."""

    @property
    def scale(self) -> float | torch.Tensor:
        """What the product is multiplied with."""
        found: float | torch.Tensor = self.__dict__["scale"]  # under its own name, by which views look for numbers
        return found

    @scale.setter
    def scale(self, value: float | torch.Tensor) -> None:
        self.__dict__["scale"] = value
        note_rescaled(self)


class LoraLinear(TellsScale, OnLinear):
    """LoRA on a linear layer: what decoding meets on every layer, so its tensors are kept at hand."""

    reads_values = False
    stacked_names = OnLinear.factor_names

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        # Where A and B are registered: each step on the way to a tensor would cost a tenth of a small product, and in a
        # mixed batch a miss of the cache.
        a, b = (self.registered[name].registry for name in self.factor_names)
        self._held: tuple[Registry, Registry] = (a, b)
        self._is_product = b["bias"] is None and not self.shows

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        found: torch.Tensor = self.wrapped(inner)(x)
        return found

    def wrapped(self, inner: Forward) -> Forward:
        scale = self.__dict__["scale"]
        if type(scale) is not float or (self.dropout and self.training):
            around = super().around
            return lambda x: around(x, inner)
        a, b = self._held

        # In one function, with nothing called but what computes.
        def run(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = inner(x)
            weight = a["weight"]
            if x.dtype is not weight.dtype or weight.is_meta:
                x = cast_to(x, weight)
            update = F.linear(F.linear(x, weight), b["weight"], b["bias"])
            # As `add_scaled` does it.
            out = y + scale * update if _is_compiling() else torch.add(y, update, alpha=scale)
            return out if out.dtype is y.dtype else out.to(y.dtype)

        return run

    def factors(self) -> Factors | None:
        scale = self.scale
        if not self._is_product or (self.dropout and self.training) or isinstance(scale, torch.Tensor):
            return None
        a, b = self._held
        return Factors(a["weight"], b["weight"], scale)

    def product_scale(self) -> float | None:
        # Not `self.scale`: a mixed batch asks this of every adapter on every layer.
        scale: float | torch.Tensor = self.__dict__["scale"]
        if not self._is_product or (self.dropout and self.training) or isinstance(scale, torch.Tensor):
            return None
        return scale


class OnEmbedding(LowRank):
    """On an embedding, where the first product is a look-up: `y = base(ids) + s * A^T[ids] B^T`."""

    factor_names = ("lora_embedding_A", "lora_embedding_B")
    a = Held("lora_embedding_A")
    b = Held("lora_embedding_B")

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        (vocabulary, dim), r = features(base), cls.rank(config, path)
        return {"lora_embedding_A": Slot((r, vocabulary)), "lora_embedding_B": Slot((dim, r))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        a, b = (tensors[name] for name in cls.factor_names)
        nn.init.normal_(b)
        if config.init_lora_weights is False:
            nn.init.normal_(a)
        else:
            nn.init.zeros_(a)

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        assert isinstance(base, nn.Embedding)
        self.dropout = 0.0  # the input is token ids
        self.look_up = (base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse)
        # Some models multiply what they look up (Gemma, BART); the update is multiplied alike.
        factor = embed_scale(base)
        self.embed_scale = 1.0 if factor is None else float(factor)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def down(self, x: torch.Tensor) -> torch.Tensor:
        return F.embedding(x, self.a.T, *self.look_up)

    def up(self, hidden: torch.Tensor) -> torch.Tensor:
        found = hidden @ self.b.T
        return found if self.embed_scale == 1.0 else found * self.embed_scale

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        return self.scale * product(self.b, self.a).T


class LoraEmbedding(OnEmbedding):
    """LoRA on an embedding."""

    reads_values = False


class OnConvolution(LowRank):
    """On a convolution: a convolution to r channels, then a pointwise one with the groups of the base.

    The first one takes kernel, stride, padding and dilation of the base, and never its groups.
    """

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        (size_in, size_out), kernel, r = features(base), kernel_size(base), cls.rank(config, path)
        groups = as_convolution(base).groups
        if r % groups:
            raise ValueError(f"{path}: rank {r} must be a multiple of the convolution's groups ({groups})")
        found = {
            "lora_A.weight": Slot((r, size_in, *kernel)),
            "lora_B.weight": Slot((size_out, r // groups, *(1,) * len(kernel))),
        }
        return {**found, "lora_B.bias": Slot((size_out,))} if config.lora_bias else found

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        conv = as_convolution(base)
        self.convolve = convolve(conv)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        # The update mixes groups, and pads with zeros also where the base does not: then it is no change of the weight.
        self.mergeable = conv.groups == 1 and pads_with_zeros(base)

    def down(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolve(x, self.a, None, self.stride, self.padding, self.dilation)

    def up(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.convolve(hidden, self.b, self.find("lora_B.bias"), 1, 0, 1, self.groups)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        if not self.mergeable:
            return None
        return self.scale * product(self.b.flatten(1), self.a.flatten(1)).reshape(weight.shape)


class LoraConv(OnConvolution):
    """LoRA on a convolution."""

    reads_values = False


def product(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """`B @ A`; half-precision factors on the CPU are multiplied in float32, and rounded by whoever adds the product."""
    if a.device.type == "cpu" and a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    return b @ a
