"""Several LoRA adapters combined into one: the ways in which factors are summed, pruned and elected.

With A_i, B_i and scale s_i of adapter i and its weight w_i, D_i = s_i B_i A_i is its update. The exact combinations are
`cat` and `svd` (of sum w_i D_i, truncated); `linear` and the pruning ones work on the factors, as the reference does.

The result is plain LoRA: relatives whose update is a product take part as the plain LoRA that computes the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from splice.errors import warn
from splice.kinds.combining import Combination, Combine, Weighted
from splice.kinds.layer import AdapterLayer
from splice.methods.lora.alora import AloraLinear
from splice.methods.lora.attention import LoraAttention, LoraOutProjection
from splice.methods.lora.config import LoraConfig, active_variants, with_rank
from splice.methods.lora.inits import CORDA, LOFTQ, LORA_GA, MICA, takes_from_base
from splice.methods.lora.layers import (
    LoraConv,
    LoraEmbedding,
    LoraLinear,
    LowRank,
    OnConvolution,
    OnEmbedding,
    OnLinear,
)
from splice.methods.lora.pruning import MERGES, PRUNING

TYPES = ("cat", "linear", "svd", *PRUNING, *(f"{name}_svd" for name in PRUNING))
_BIAS = "lora_B.bias"
# Layers that are plain LoRA, or that differ from it by where it takes effect; a result may be of their class.
_PLAIN = (LoraLinear, LoraEmbedding, LoraConv, AloraLinear, LoraAttention, LoraOutProjection)
# What the result is elsewhere, by what the layer of the relative is built on.
_PLAIN_ON: tuple[tuple[type[LowRank], type[LowRank]], ...] = (
    (OnLinear, LoraLinear),
    (OnEmbedding, LoraEmbedding),
    (OnConvolution, LoraConv),
)


class _Part(NamedTuple):
    """One adapter on one layer: its factors as matrices (r, in) and (out, r / groups), its scale and its weight."""

    # A, (r, in).
    a: torch.Tensor
    # B, (out, r / groups): only convolutions have groups, and each sees its own share of the ranks.
    b: torch.Tensor
    # s, the adapter's own scale.
    scale: float
    # w, the adapter's weight in the sum.
    weight: float

    @property
    def delta(self) -> torch.Tensor:
        return self.scale * self.b @ self.a

    def group(self, index: int, groups: int) -> _Part:
        """What it is to one group of a convolution: an update of its own."""
        return self._replace(a=self.a.chunk(groups)[index], b=self.b.chunk(groups)[index])


def _part(layer: LowRank, weight: float) -> _Part:
    found = layer.plain()
    # In float32: there is no decomposition in half precision, and sums would be rounded at every step.
    a, b = (factor.detach().flatten(1).float() for factor in (found.a, found.b))
    return _Part(a, b, float(found.scale), weight)


def _summed(parts: Sequence[_Part], how: Combination, rank: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank / groups) of the combination; ranks that it has no use for are zero."""
    if how.kind in _BY_FACTOR:
        a, b = _factors(parts, how, rank)
        found = list(zip(a.chunk(groups), b.chunk(groups)))
    else:
        # Ranks belong to groups, so each group is stacked or decomposed by itself.
        found = [_factors([part.group(i, groups) for part in parts], how, rank // groups) for i in range(groups)]
    sides = zip(*(_filled(a, b, rank // groups) for a, b in found))
    first, second = (torch.cat(side) for side in sides)
    return first, second


def _filled(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    full_a, full_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    full_a[: a.shape[0]] = a
    full_b[:, : b.shape[1]] = b
    return full_a, full_b


def _factors(parts: Sequence[_Part], how: Combination, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    if how.kind == "cat":
        a = torch.cat([part.weight * part.scale * part.a for part in parts])
        return a, torch.cat([part.b for part in parts], dim=1)
    if how.kind == "svd":
        return _truncated(
            sum((part.weight * part.delta for part in parts[1:]), parts[0].weight * parts[0].delta), how, rank
        )
    merge = MERGES[how.kind.removesuffix("_svd")]
    if how.kind.endswith("_svd"):
        delta = merge(torch.stack([part.delta for part in parts]), [part.weight for part in parts], how)
        return _truncated(delta, how, rank)
    shares = [part.weight * part.scale for part in parts]
    a = merge(torch.stack([part.a for part in parts]), [math.copysign(math.sqrt(abs(s)), s) for s in shares], how)
    return a, merge(torch.stack([part.b for part in parts]), [math.sqrt(abs(s)) for s in shares], how)


def _truncated(delta: torch.Tensor, how: Combination, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the best approximation of `delta` of this rank."""
    # Only the leading vectors are used, so the full square matrices are never worked out.
    u, s, vh = torch.linalg.svd(delta, full_matrices=False, driver=how.svd_driver)
    b, a = u[:, :rank] * s[:rank], vh[:rank]
    if how.svd_clamp is not None:
        limit = torch.quantile(torch.cat([b.flatten(), a.flatten()]), how.svd_clamp)
        a, b = a.clamp(-limit, limit), b.clamp(-limit, limit)
    return a, b


# They work on A and on B, each by itself, so the ranks of all adapters have to be the same.
_BY_FACTOR = ("linear", *PRUNING)


class CombinedFactors(Combine):
    """Low-rank updates: their factors are stacked, summed, or found again in the sum of the updates."""

    def check(self, how: Combination, peft_type: str) -> None:
        if how.kind not in TYPES:
            raise ValueError(f"Invalid combination_type: {how.kind!r}; known are {', '.join(TYPES)}")
        if how.kind.removesuffix("_svd") in PRUNING:
            if how.density is None or how.density < 0:
                raise ValueError(f"{how.kind!r} needs a `density` of at least 0, got {how.density}")
            if how.density >= 1:
                warn("density of 1 or more: nothing is pruned")
        if how.majority_sign_method not in ("total", "frequency"):
            raise ValueError(f"Unimplemented majority_sign_method {how.majority_sign_method!r}")

    def copies(self, config: LoraConfig) -> bool:
        # What follows from data cannot be worked out again, so it becomes a part of the new adapter's factors.
        return not _is_plain(config) and config.init_lora_weights not in (CORDA, LORA_GA)

    def config(self, united: LoraConfig, configs: Mapping[str, LoraConfig], how: Combination) -> LoraConfig:
        _check_invocations(configs)
        # rsLoRA's scale would be sqrt(rank) here, so the new adapter is a plain one of scale 1.
        sized = with_rank(united, _new_rank(list(configs.values()), how))
        has_bias = any(config.lora_bias for config in configs.values())
        # A config with `lora_bias` names no initialisation, and the others would take something out of the base again.
        keeps_init = _is_plain(united) and not has_bias
        return dataclasses.replace(
            sized,
            lora_bias=has_bias,
            init_lora_weights=sized.init_lora_weights if keeps_init else True,
            loftq_config={},
            use_dora=False,
            use_bdlora=None,
            kasa_config=None,
            velora_config=None,
            monteclora_config=None,
        )

    def layer_class(self, first: AdapterLayer) -> type[AdapterLayer]:
        if isinstance(first, _PLAIN):
            return type(first)
        return next((plain for built_on, plain in _PLAIN_ON if isinstance(first, built_on)), type(first))

    def tensors(
        self, base: nn.Module, path: str, config: LoraConfig, layers: Weighted, how: Combination
    ) -> dict[str, torch.Tensor]:
        found = [(_low_rank(layer, path), weight) for layer, weight in layers]
        first = found[0][0]
        cls = self.layer_class(first)
        assert issubclass(cls, LowRank)
        slots = cls.slots(base, config, path)
        names = cls.factor_names
        parts = [_part(layer, weight) for layer, weight in found]
        _check_ranks(parts, how, path)
        made = dict(zip(names, _summed(parts, how, config.r, config.r // slots[names[1]].shape[1])))
        if _BIAS in slots:
            made[_BIAS] = _bias(found, slots[_BIAS].shape)
        return {name: tensor.reshape(slots[name].shape).to(first.a) for name, tensor in made.items()}


# The field of aLoRA: the one relative that the result may be, as its update is LoRA's own.
_INVOKED = "alora_invocation_tokens"


def _is_plain(config: LoraConfig) -> bool:
    """Whether its tensors are those of plain LoRA, so that nothing else has to be copied."""
    init = config.init_lora_weights
    return (
        set(active_variants(config)) <= {_INVOKED} and not takes_from_base(init) and init not in (LOFTQ, MICA, LORA_GA)
    )


def _check_invocations(configs: Mapping[str, LoraConfig]) -> None:
    tokens = {name: config.alora_invocation_tokens or None for name, config in configs.items()}
    first, *others = tokens
    other = next((name for name in others if tokens[name] != tokens[first]), None)
    if other is not None:
        raise ValueError(
            f"adapters {first!r} and {other!r} take effect at other tokens ({_INVOKED} {tokens[first]} and {tokens[other]}), "
            "so no single adapter computes their sum. Combine adapters with the same invocation; with `set_adapter` on "
            "`base_model`, several can be active together as they are."
        )


def _low_rank(layer: AdapterLayer, path: str) -> LowRank:
    if not isinstance(layer, LowRank):
        raise ValueError(
            f"{path}: add_weighted_adapter does not support targeting nn.Parameter (`target_parameters`), which one of the "
            "adapters does here."
        )
    return layer


def _check_ranks(parts: Sequence[_Part], how: Combination, path: str) -> None:
    ranks = [part.a.shape[0] for part in parts]
    if how.kind in _BY_FACTOR and len(set(ranks)) != 1:
        raise ValueError(f"{path}: {_other_ranks(how, ranks)}")


def _other_ranks(how: Combination, ranks: Sequence[int]) -> str:
    return (
        f"All adapters must have the same r value when using combination_type {how.kind!r}; got {ranks}. "
        "'cat' and 'svd' combine different ranks."
    )


def _bias(layers: Sequence[tuple[LowRank, float]], shape: tuple[int, ...]) -> torch.Tensor:
    """The sum of the biases of B, each by its scale and weight. A layer without one adds nothing."""
    total = layers[0][0].a.new_zeros(shape, dtype=torch.float32)
    for layer, weight in layers:
        bias = layer.delta_bias()
        if bias is not None:
            total = total + weight * bias.detach().to(total)
    return total


def _new_rank(configs: Sequence[LoraConfig], how: Combination) -> int:
    ranks = [max([config.r, *config.rank_pattern.values()]) * _width(config) for config in configs]
    if how.kind == "cat":
        return sum(ranks)
    if how.kind.endswith("svd"):
        return how.svd_rank or max(ranks)
    if len(set(ranks)) != 1:
        raise ValueError(_other_ranks(how, ranks))
    return ranks[0]


def _width(config: LoraConfig) -> int:
    """How many ranks of plain LoRA one of its ranks is: what is taken out of the base counts as well."""
    init = config.init_lora_weights
    return 2 if takes_from_base(init) or init == LORA_GA or config.kasa_config is not None else 1
