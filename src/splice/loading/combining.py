"""Several adapters combined into one new adapter.

Of a method whose tensors add up (`Combining.SUM`) each tensor is the weighted sum of theirs. The rest is about LoRA.

With A_i, B_i and scale s_i of adapter i and its weight w_i, D_i = s_i B_i A_i is its update. The exact combinations are
`cat` and `svd` (of sum w_i D_i, truncated); `linear` and the pruning ones work on the factors, as the reference does.
TIES is Yadav et al., arXiv 2306.01708; DARE is Yu et al., arXiv 2311.03099.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from splice.config import PeftConfig, copy_config
from splice.errors import UnsupportedFeatureError
from splice.kinds.layer import AdapterLayer
from splice.kinds.module_copy import WholeModule
from splice.kinds.registry import Combining
from splice.loading.commit import Built
from splice.methods.lora.record import LoraLayer, with_rank
from splice.surgery.placement import Placement

if TYPE_CHECKING:
    from splice.surgery.tuner import Tuner

_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = ("cat", "linear", "svd", *_PRUNING, *(f"{name}_svd" for name in _PRUNING))


@dataclass(frozen=True)
class Combination:
    """How to combine; the fields are the arguments of `PeftModel.add_weighted_adapter`."""

    kind: str
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"


@dataclass(frozen=True)
class _Part:
    """One adapter on one layer: its factors as matrices (r, in) and (out, r), its scale and its weight."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    weight: float

    @property
    def delta(self) -> torch.Tensor:
        return self.scale * self.b @ self.a


@torch.no_grad()
def add_weighted_adapter(
    tuner: Tuner, adapters: Sequence[str], weights: Sequence[float], name: str, combination: Combination
) -> None:
    """Add the combination as a new adapter, frozen and not active.

    A name that is taken is a silent no-op, as in the reference.

    Raises:
        ValueError: an adapter is unknown, the combination is, or the adapters cannot be combined that way.
    """
    if name in tuner.peft_config:
        return
    tuner.check_new(name)
    if tuner.method.combining is not Combining.FACTORS:
        _check_summed(tuner, combination)
    if len(adapters) == 1:
        combination = Combination("linear")
    _check(tuner, adapters, weights, combination)
    summed = tuner.method.combining is Combining.SUM
    rank = 0 if summed else _new_rank(tuner, adapters, combination)
    config = _united(tuner, adapters)
    if not summed:  # rsLoRA's scale would be sqrt(rank) here, so the new adapter is a plain one of scale 1
        config = with_rank(config, rank)  # type: ignore[arg-type]
    built = []
    for path in dict.fromkeys(path for adapter in adapters for path in tuner.placed[adapter]):
        present = [(tuner.placed[a][path], w) for a, w in zip(adapters, weights) if path in tuner.placed[a]]
        built.append(_combined(tuner, path, present, config, combination, rank))
    tuner.commit(name, config, built, freeze_base=False)


def _check(tuner: Tuner, adapters: Sequence[str], weights: Sequence[float], combination: Combination) -> None:
    tuner.check_known(adapters)
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"needs one weight for each adapter, got {list(adapters)} and {list(weights)}")
    if combination.kind not in TYPES:
        raise ValueError(f"Invalid combination_type: {combination.kind!r}; known are {', '.join(TYPES)}")
    if combination.kind.removesuffix("_svd") in _PRUNING:
        if combination.density is None or combination.density < 0:
            raise ValueError(f"{combination.kind!r} needs a `density` of at least 0, got {combination.density}")
        if combination.density >= 1:
            warnings.warn("density of 1 or more: nothing is pruned", stacklevel=5)
    if combination.majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"Unimplemented majority_sign_method {combination.majority_sign_method!r}")
    tied = [path for a in adapters for path, layer in tuner.placed[a].items() if layer.leader or layer.own_config]
    if tied:
        raise UnsupportedFeatureError(
            f"adapters with rows of single tokens, or with layers that are tied to others, cannot be combined ({tied[0]!r})"
        )
    copies = [path for a in adapters for path, layer in tuner.placed[a].items() if isinstance(layer, WholeModule)]
    if len(set(copies)) != len(copies):
        raise ValueError(
            f"Cannot add weighted adapters that both have a copy of {sorted(copies)[0]!r} (modules_to_save)"
        )


def _new_rank(tuner: Tuner, adapters: Sequence[str], combination: Combination) -> int:
    ranks: list[int] = []
    for adapter in adapters:
        config: Any = tuner.peft_config[adapter]
        ranks.append(max([config.r, *config.rank_pattern.values()]))
    if combination.kind == "cat":
        return sum(ranks)
    if combination.kind.endswith("svd"):
        return combination.svd_rank or max(ranks)
    if len(set(ranks)) != 1:
        raise ValueError(
            f"All adapters must have the same r value when using combination_type {combination.kind!r}; got {ranks}. "
            "'cat' and 'svd' combine different ranks."
        )
    return ranks[0]


def _check_summed(tuner: Tuner, combination: Combination) -> None:
    method = tuner.method
    if method.combining is Combining.NONE:
        raise UnsupportedFeatureError(f"adapters of {method.name.value} cannot be combined into a new one")
    if combination not in (Combination("svd"), Combination("linear")):
        raise ValueError(
            f"{combination} is a way to combine low-rank factors; {method.name.value} has none, and its adapters are "
            "combined by the weighted sum of their tensors. Leave these arguments out."
        )


def _united(tuner: Tuner, adapters: Sequence[str]) -> PeftConfig:
    """The config of the first adapter, on the layers of all of them."""
    names = ("target_modules", *tuner.method.default_modules)
    configs = [tuner.peft_config[a] for a in adapters]
    united = {name: _union([getattr(config, name) for config in configs], name) for name in names}
    return copy_config(configs[0], inference_mode=True, **united)


def _union(values: Sequence[Any], name: str) -> Any:
    if len({isinstance(value, str) for value in values}) > 1:
        raise ValueError(f"all adapter configs should use the same type for `{name}`: all a str, or all a list")
    if isinstance(values[0], str):
        return "|".join(f"({pattern})" for pattern in dict.fromkeys(values))
    return set().union(*(value or () for value in values))


def _combined(
    tuner: Tuner, path: str, present: Sequence[tuple[Any, float]], config: Any, how: Combination, rank: int
) -> Built:
    base: Any = tuner.adapted[path]
    first = present[0][0]
    if isinstance(first, WholeModule):
        copied = {name: tensor.detach().clone() for name, tensor in first.named_slots()}
        placement = Placement(path, base, WholeModule, {n: tuple(t.shape) for n, t in copied.items()})
        return Built(placement, WholeModule(base, config, path, copied))
    cls = type(first)
    slots = cls.slots(base, config, path)
    if tuner.method.combining is Combining.SUM:
        return Built(Placement(path, base, cls, slots), cls(base, config, path, _summed(slots, present, path)))
    parts = [_part(layer, weight) for layer, weight in present]
    a, b = _factors(parts, how, rank)
    fresh = {name: torch.zeros(shape) for name, shape in slots.items()}
    cls.initialise(fresh, base, config)
    tensors = _fitted(slots, cls.names, a, b, first, fresh)
    return Built(Placement(path, base, cls, slots), cls(base, config, path, tensors))


def _summed(
    slots: dict[str, tuple[int, ...]], present: Sequence[tuple[AdapterLayer, float]], path: str
) -> dict[str, torch.Tensor]:
    """Each tensor as the weighted sum of those that the adapters have on this layer."""
    result: dict[str, torch.Tensor] = {}
    for layer, weight in present:
        for name, tensor in layer.named_slots():
            if tuple(tensor.shape) != slots[name]:
                raise ValueError(
                    f"{path}: {name} is {tuple(tensor.shape)} in one of the adapters, and would be {slots[name]}: they "
                    "act on this layer in different ways, so their sum has no meaning."
                )
            part = weight * tensor.detach()
            result[name] = result[name] + part if name in result else part
    return result


def _part(layer: LoraLayer, weight: float) -> _Part:
    tensors = dict(layer.named_slots())
    a, b = (tensors[name].detach().flatten(1).float() for name in layer.names)
    return _Part(a, b, float(layer.scale), weight)


def _fitted(
    slots: dict[str, tuple[int, ...]],
    names: tuple[str, str],
    a: torch.Tensor,
    b: torch.Tensor,
    like: LoraLayer,
    fresh: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The factors in the shapes of the new adapter's slots; ranks that are left over are zero. The rest is `fresh`."""
    dtype = next(like.parameters()).dtype
    full_a, full_b = a.new_zeros(slots[names[0]]).flatten(1), b.new_zeros(slots[names[1]]).flatten(1)
    full_a[: a.shape[0]] = a
    full_b[:, : b.shape[1]] = b
    made = {names[0]: full_a.reshape(slots[names[0]]), names[1]: full_b.reshape(slots[names[1]])}
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
