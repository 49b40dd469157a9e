"""Several adapters combined into one new adapter.

Of a method whose tensors add up (`Combining.SUM`) each tensor is the weighted sum of theirs. The rest is about LoRA.

With A_i, B_i and scale s_i of adapter i and its weight w_i, D_i = s_i B_i A_i is its update. The exact combinations are
`cat` and `svd` (of sum w_i D_i, truncated); `linear` and the pruning ones work on the factors, as the reference does.
TIES is Yadav et al., arXiv 2306.01708; DARE is Yu et al., arXiv 2311.03099.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from splice.config import PeftConfig, copy_config
from splice.errors import UnsupportedFeatureError, warn
from splice.kinds.layer import AdapterLayer
from splice.kinds.module_copy import WholeModule
from splice.kinds.registry import Combining
from splice.methods.lora.combining import _PRUNING, TYPES, Combination, _factors, _fitted, _new_rank, _part
from splice.methods.lora.config import with_rank
from splice.surgery.placement import Built, Placement

if TYPE_CHECKING:
    from splice.surgery.tuner import Tuner


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
            warn("density of 1 or more: nothing is pruned")
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
