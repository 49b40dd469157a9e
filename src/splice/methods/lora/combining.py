"""Several LoRA adapters combined into one: the ways in which factors are summed, pruned and elected.

With A_i, B_i and scale s_i of adapter i and its weight w_i, D_i = s_i B_i A_i is its update. The exact combinations are
`cat` and `svd` (of sum w_i D_i, truncated); `linear` and the pruning ones work on the factors, as the reference does.
TIES is Yadav et al., arXiv 2306.01708; DARE is Yu et al., arXiv 2311.03099.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from splice.errors import warn
from splice.kinds.combining import Combination, Combine, Weighted
from splice.kinds.layer import AdapterLayer
from splice.kinds.slot import Slot
from splice.methods.lora.config import LoraConfig, with_rank
from splice.methods.lora.layers import LowRank

_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = ("cat", "linear", "svd", *_PRUNING, *(f"{name}_svd" for name in _PRUNING))


class _Part(NamedTuple):
    """One adapter on one layer: its factors as matrices (r, in) and (out, r), its scale and its weight."""

    # A, (r, in).
    a: torch.Tensor
    # B, (out, r).
    b: torch.Tensor
    # s, the adapter's own scale.
    scale: float
    # w, the adapter's weight in the sum.
    weight: float

    @property
    def delta(self) -> torch.Tensor:
        return self.scale * self.b @ self.a


def _part(layer: AdapterLayer, weight: float) -> _Part:
    assert isinstance(layer, LowRank)
    tensors = dict(layer.named_slots())
    # In float32: there is no decomposition in half precision, and sums would be rounded at every step.
    a, b = (tensors[name].detach().flatten(1).float() for name in layer.factor_names)
    return _Part(a, b, float(layer.scale), weight)


def _fitted(
    slots: dict[str, Slot],
    names: tuple[str, str],
    a: torch.Tensor,
    b: torch.Tensor,
    like: LowRank,
    fresh: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The factors in the shapes of the new adapter's slots; ranks that are left over are zero. The rest is `fresh`."""
    dtype = like.a.dtype
    full_a, full_b = a.new_zeros(slots[names[0]].shape).flatten(1), b.new_zeros(slots[names[1]].shape).flatten(1)
    full_a[: a.shape[0]] = a
    full_b[:, : b.shape[1]] = b
    made = {names[0]: full_a.reshape(slots[names[0]].shape), names[1]: full_b.reshape(slots[names[1]].shape)}
    rest = {name: tensor.to(a) for name, tensor in fresh.items() if name not in made}
    return {name: tensor.to(dtype) for name, tensor in {**made, **rest}.items()}


def _factors(parts: Sequence[_Part], how: Combination, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    if how.kind == "cat":
        a = torch.cat([part.weight * part.scale * part.a for part in parts])
        return a, torch.cat([part.b for part in parts], dim=1)
    if how.kind == "svd":
        return _truncated(
            sum((part.weight * part.delta for part in parts[1:]), parts[0].weight * parts[0].delta), how, rank
        )
    merge = _MERGES[how.kind.removesuffix("_svd")]
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


def _weighted_sum(tensors: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    factors = torch.tensor(weights, dtype=tensors.dtype, device=tensors.device)
    summed: torch.Tensor = torch.tensordot(factors, tensors, dims=1)
    return summed


def _by_magnitude(tensors: torch.Tensor, density: float) -> torch.Tensor:
    """Each tensor with all but its largest values set to zero."""
    flat = tensors.flatten(1)
    kept = int(density * flat.shape[1]) if density < 1 else flat.shape[1]
    mask = torch.zeros_like(flat).scatter_(1, flat.abs().topk(kept, dim=1).indices, 1.0)
    return (flat * mask).reshape(tensors.shape)


def _at_random(tensors: torch.Tensor, density: float) -> torch.Tensor:
    """Each value kept with this probability, and the kept ones enlarged to leave the expectation as it was."""
    if density >= 1:
        return tensors
    return tensors * torch.bernoulli(torch.full_like(tensors, density)) / density


def _elected(pruned: torch.Tensor, weights: Sequence[float], method: str) -> torch.Tensor:
    """TIES: values that disagree with the elected sign are left out, the others averaged over their number."""
    votes = pruned.sign().sum(0) if method == "frequency" else pruned.sum(0)
    agrees = pruned.sign() == torch.where(votes >= 0, 1.0, -1.0)
    factors = torch.tensor(weights, dtype=pruned.dtype, device=pruned.device)
    summed: torch.Tensor = torch.tensordot(factors, pruned * agrees, dims=1)
    return summed / agrees.sum(0).clamp(min=1)


_Merge = Callable[[torch.Tensor, Sequence[float], Combination], torch.Tensor]


_MERGES: dict[str, _Merge] = {
    "linear": lambda t, w, how: _weighted_sum(t, w),
    "magnitude_prune": lambda t, w, how: _weighted_sum(_by_magnitude(t, how.density or 0), w),
    "dare_linear": lambda t, w, how: _weighted_sum(_at_random(t, how.density or 0), w),
    "ties": lambda t, w, how: _elected(_by_magnitude(t, how.density or 0), w, how.majority_sign_method),
    "dare_ties": lambda t, w, how: _elected(_at_random(t, how.density or 0), w, how.majority_sign_method),
}


class CombinedFactors(Combine):
    """Low-rank updates: their factors are stacked, summed, or found again in the sum of the updates."""

    def check(self, how: Combination, peft_type: str) -> None:
        if how.kind not in TYPES:
            raise ValueError(f"Invalid combination_type: {how.kind!r}; known are {', '.join(TYPES)}")
        if how.kind.removesuffix("_svd") in _PRUNING:
            if how.density is None or how.density < 0:
                raise ValueError(f"{how.kind!r} needs a `density` of at least 0, got {how.density}")
            if how.density >= 1:
                warn("density of 1 or more: nothing is pruned")
        if how.majority_sign_method not in ("total", "frequency"):
            raise ValueError(f"Unimplemented majority_sign_method {how.majority_sign_method!r}")

    def config(self, united: LoraConfig, configs: Sequence[LoraConfig], how: Combination) -> LoraConfig:
        # rsLoRA's scale would be sqrt(rank) here, so the new adapter is a plain one of scale 1.
        return with_rank(united, _new_rank(configs, how))

    def tensors(
        self, base: nn.Module, path: str, config: LoraConfig, layers: Weighted, how: Combination
    ) -> dict[str, torch.Tensor]:
        first, _ = layers[0]
        assert isinstance(first, LowRank)
        a, b = _factors([_part(layer, weight) for layer, weight in layers], how, config.r)
        slots = type(first).slots(base, config, path)
        fresh = {name: torch.zeros(slot.shape) for name, slot in slots.items()}
        type(first).initialise(fresh, base, config)
        return _fitted(slots, first.factor_names, a, b, first, fresh)


def _new_rank(configs: Sequence[LoraConfig], how: Combination) -> int:
    ranks = [max([config.r, *config.rank_pattern.values()]) for config in configs]
    if how.kind == "cat":
        return sum(ranks)
    if how.kind.endswith("svd"):
        return how.svd_rank or max(ranks)
    if len(set(ranks)) != 1:
        raise ValueError(
            f"All adapters must have the same r value when using combination_type {how.kind!r}; got {ranks}. "
            "'cat' and 'svd' combine different ranks."
        )
    return ranks[0]
