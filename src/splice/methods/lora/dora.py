"""DoRA: LoRA on the direction of each row of the weight, and a trained magnitude for each row.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, section 4. With D = s * B A and n(.) the norm of
every row, `W' = m / n(W + D) * (W + D)`. As in section 4.3 the norm is a constant in the backward. W is the base's own
weight in it, also where several adapters are active or merged: then each takes what the one before it gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import cast

import torch
from torch import nn

from splice.base.weight_access import bias_of
from splice.errors import UnsupportedFeatureError
from splice.kinds.effect import Action, Factors, Forward
from splice.kinds.finishing import Finishing
from splice.kinds.lasting import lasting
from splice.kinds.names import LayerNames, Place
from splice.kinds.original import original_weight, scaled_bias, tensor_in_use
from splice.kinds.scale import Scale, add_scaled
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.kinds.weight_delta import operation_of
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.dora_caching import DoraCaching, state_of
from splice.methods.lora.kept_norms import Kept, can_be_traced, may_keep, trace_of, trace_of_sum
from splice.methods.lora.layers import LowRank, OnConvolution, OnEmbedding, OnLinear, TellsScale

MAGNITUDE = "lora_magnitude_vector"


class Dora(LowRank):
    """What DoRA on every kind of layer shares. It stands before the LoRA layer of the kind."""

    names = LayerNames(places=MappingProxyType({MAGNITUDE: Place(MAGNITUDE, "weight")}))
    reads_weight = True
    action = Action.OTHER  # it scales what the one before it gives
    magnitude = Held(MAGNITUDE)
    # Whether the base has a bias, which keeps its size.
    has_bias: bool = False
    # The norm that is kept between calls; None while none is.
    kept: Kept | None = None

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.operation = operation_of(base)
        self.has_bias = bias_of(base) is not None

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        super().initialise({name: t for name, t in tensors.items() if name != MAGNITUDE}, base, config)
        magnitude = tensors[MAGNITUDE]
        magnitude.copy_(cls.sizes(original_weight(base).to(magnitude.dtype)).reshape(magnitude.shape))

    @torch.no_grad()
    def begin(self) -> None:
        magnitude = self.magnitude
        if magnitude.is_meta or not (self.a.any() and self.b.any()):
            return  # the update is zero: the magnitudes are those of the base alone, as they were initialised
        magnitude.copy_(self.norm(self.base_weight(magnitude.dtype)).reshape(magnitude.shape))

    @staticmethod
    def sizes(weight: torch.Tensor) -> torch.Tensor:
        """n(.), of as many dimensions as the weight."""
        norm: torch.Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)
        return norm

    def base_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that the magnitudes are measured on."""
        weight = original_weight(self.base)
        return weight if weight.dtype is dtype else weight.to(dtype)

    def total(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight + D`, both in the dtype of the adapter."""
        raise NotImplementedError

    @staticmethod
    def rows(weight: torch.Tensor) -> torch.Tensor:
        """The weight as a matrix, whose rows have the norms n(.)."""
        return weight.flatten(1)

    def norm(self, weight: torch.Tensor, trace: torch.Tensor | None = None) -> torch.Tensor:
        """n(W + D), of as many dimensions as the weight, without a graph; as it was kept, where that is still so.

        Args:
            weight: `base_weight`.
            trace: `trace_of` its `rows`, where somebody has it.
        """
        if torch.is_grad_enabled():  # asked first: a mixed batch comes here for each of its adapters
            with torch.no_grad():
                return self._norm(weight, trace)
        return self._norm(weight, trace)

    def _norm(self, weight: torch.Tensor, trace: torch.Tensor | None) -> torch.Tensor:
        if not may_keep(weight):
            return self.sizes(self.total(weight))
        if self.training:  # values change from call to call
            self.kept = None
            return self.sizes(self.total(weight))
        kept, state = self.kept, self._state(weight) if DoraCaching.on else None
        if kept is not None and state is not None and kept.state == state:
            return kept.norm
        trace = self._trace(weight, trace)
        if trace is not None and kept is not None and kept.trace is not None and torch.equal(kept.trace, trace):
            norm = kept.norm
        else:
            with lasting():
                norm = self.sizes(self.total(weight))
        self.kept = Kept(norm, trace, state) if trace is not None or state is not None else None
        return norm

    def _state(self, weight: torch.Tensor) -> tuple[object, ...]:
        """What tells, without reading a value, whether the norm is another one."""
        # Not `weight` itself: it may have been worked out for this call.
        tensors = (self.a, self.b, self.base._parameters.get("weight"))
        scale = self.scale
        return (*state_of(tensors), weight.dtype, state_of((scale,)) if isinstance(scale, torch.Tensor) else scale)

    def _trace(self, weight: torch.Tensor, of_weight: torch.Tensor | None) -> torch.Tensor | None:
        """What tells the same by reading all of them once; None where it cannot. Arguments as of `norm`."""
        a, b, scale = self.a, self.b, self.scale
        if not self.mergeable or not can_be_traced(weight, a, b, scale):
            return None
        return trace_of_sum(trace_of(self.rows(weight)) if of_weight is None else of_weight, b, a, cast(float, scale))

    def ratio(self, weight: torch.Tensor) -> torch.Tensor:
        """m / n(W + D), so shaped that it multiplies the weight."""
        norm = self.norm(weight)
        return self.magnitude.reshape(norm.shape) / norm

    def on_output(self, tensor: torch.Tensor) -> torch.Tensor:
        """A value for every output, so shaped that it multiplies the output; it may come as `ratio` gives it."""
        return tensor.flatten()

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        y: torch.Tensor = inner(x)
        h = self.cast_input(x)
        weight = self.base_weight(self.magnitude.dtype)
        ratio = self.on_output(self.ratio(weight))
        if self.dropout and self.training:
            h = nn.functional.dropout(h, self.dropout)
            # The part of the base in the correction sees the dropped input too, the output of the base does not.
            out = y + (ratio - 1) * self.operation(h, weight) + ratio * (self.scale * self.delta(h))
            return out.to(y.dtype)
        bias = tensor_in_use(self.base, "bias", self) if self.has_bias else None
        if bias is None:
            out = add_scaled(y, self.delta(h), self.scale) * ratio
        else:
            bias = self.on_output(bias)
            out = torch.addcmul(bias.to(h.dtype), add_scaled(y - bias, self.delta(h), self.scale), ratio)
        return out if out.dtype is y.dtype else out.to(y.dtype)

    def plain(self) -> Factors:
        raise UnsupportedFeatureError(
            "DoRA (`use_dora`) multiplies the whole weight by magnitudes, so its adapters have no sum that is an adapter. "
            "One alone with weight 1.0 can be copied; else leave it out."
        )

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        plain = super().delta_weight(weight)
        if plain is None:
            return None
        ratio = self.ratio(self.base_weight(self.magnitude.dtype))
        return ratio * (weight + plain) - weight

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = super().deltas(tensors)
        if self.has_bias:
            ratio = self.on_output(self.ratio(self.base_weight(self.magnitude.dtype))).flatten()
            own, below = found.get("bias"), scaled_bias(self, tensors, ratio)
            parts = [part for part in (below, None if own is None else ratio * own) if part is not None]
            if parts:
                found["bias"] = torch.stack(parts).sum(0)
        return found


def _plus_product(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: Scale) -> torch.Tensor:
    """`weight + scale * left right`."""
    if isinstance(scale, torch.Tensor):
        return weight + scale * (left @ right)
    return torch.addmm(weight, left, right, alpha=scale)


class DoraOnLinear(Dora, OnLinear):
    """DoRA on a linear layer, stored either way round, for what DoRA is combined with."""

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        plain = super().slots(base, config, path)
        return {**plain, MAGNITUDE: Slot((plain["lora_B.weight"].shape[0],))}

    def total(self, weight: torch.Tensor) -> torch.Tensor:
        return _plus_product(weight, self.b, self.a, self.scale)


class DoraLinear(TellsScale, Finishing, DoraOnLinear):
    """DoRA on a linear layer: in a mixed batch the products first, then the magnitudes."""

    product_names = OnLinear.factor_names

    def product_scale(self) -> float | None:
        dropped = self.shows or (self.dropout and self.training) or "lora_B.bias" in self.registered
        return None if dropped or isinstance(self.scale, torch.Tensor) else self.scale

    @classmethod
    def finish(cls, layers: Sequence[DoraLinear], y: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        first, norms = layers[0], []
        weights: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for layer in layers:
            dtype = layer.magnitude.dtype
            if dtype not in weights:  # nearly always once for all
                weight = layer.base_weight(dtype)
                # Not where nothing is kept, nor where it is known without.
                reads = may_keep(weight) and not DoraCaching.on and can_be_traced(weight, layer.a, layer.b, layer.scale)
                weights[dtype] = weight, trace_of(weight) if reads else None
            norms.append(layer.norm(*weights[dtype]).flatten())
        ratios = torch.stack([layer.magnitude for layer in layers]) / torch.stack(norms)
        # (rows, ..., out)
        ratios = ratios[numbers].view(-1, *(1,) * (y.dim() - 2), y.shape[-1])
        bias = tensor_in_use(first.base, "bias", first) if first.has_bias else None
        if bias is None:
            return (y * ratios).to(y.dtype)
        bias = bias.to(ratios.dtype)
        return torch.addcmul(bias, y - bias, ratios).to(y.dtype)


class DoraEmbedding(Dora, OnEmbedding):
    """DoRA on an embedding: a magnitude for every column of its table."""

    @staticmethod
    def sizes(weight: torch.Tensor) -> torch.Tensor:
        norm: torch.Tensor = torch.linalg.vector_norm(weight, dim=0, keepdim=True)
        return norm

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        plain = super().slots(base, config, path)
        return {**plain, MAGNITUDE: Slot((plain["lora_embedding_B"].shape[0],))}

    @staticmethod
    def rows(weight: torch.Tensor) -> torch.Tensor:
        return weight.T

    def total(self, weight: torch.Tensor) -> torch.Tensor:
        return _plus_product(weight, self.a.T, self.b.T, self.scale)


class DoraConv(Dora, OnConvolution):
    """DoRA on a convolution: a magnitude for every output channel."""

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        plain = super().slots(base, config, path)
        size_out, _, *kernel = plain["lora_B.weight"].shape
        return {**plain, MAGNITUDE: Slot((1, size_out, *kernel))}

    def total(self, weight: torch.Tensor) -> torch.Tensor:
        # With groups this product mixes them, and is not what the layer adds: the reference trains with it all the same.
        product = self.b.reshape(-1, self.r) @ self.a.reshape(self.r, -1)
        return add_scaled(weight, product.reshape(weight.shape), self.scale)

    def on_output(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1, *(1,) * len(self.stride))
