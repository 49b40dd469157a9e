"""LoRA adapters that take the places of one another: ranks are filled up with zeros, scales belong to the layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from splice.kinds.layer import AdapterLayer
from splice.kinds.matching import value_for
from splice.kinds.swapping import Swapping
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.dora import DoraConv, DoraEmbedding, DoraLinear
from splice.methods.lora.layers import LoraConv, LoraEmbedding, LoraLinear, LowRank, OnConvolution

# Those in which rows of zeros in A, and columns of zeros in B, change nothing. Others of its relatives keep more than the
# tensors say: what was taken out of the base, blocks, invocations.
_PLAIN = (LoraLinear, LoraEmbedding, LoraConv)
_WITH_MAGNITUDES = (DoraLinear, DoraEmbedding, DoraConv)
# Fields in which two configs must agree. Not among them are ranks and alphas, also of single layers: they are exchanged.
CHECKED = ("use_rslora", "lora_dropout", "use_dora")


class RankSwapping(Swapping):
    """Plain LoRA and DoRA, on every kind of layer."""

    def check(self, old: LoraConfig, new: LoraConfig) -> None:
        for name in CHECKED:
            was, becomes = getattr(old, name), getattr(new, name)
            if was != becomes:
                raise ValueError(
                    f"Configs are incompatible: for {name}, {was} != {becomes}. Load the adapter under another name."
                )

    def refusal(self, old: AdapterLayer, new: AdapterLayer | None) -> str:
        if type(old) not in (*_PLAIN, *_WITH_MAGNITUDES):
            return f"a {type(old).__name__} holds more than its tensors say"
        if new is None:
            return "" if type(old) in _PLAIN else "the new adapter has nothing there, and magnitudes cannot be left out"
        if type(new) is not type(old):
            return f"the new adapter has a {type(new).__name__} there, and this is a {type(old).__name__}"
        more = sorted(new.registered.keys() - old.registered.keys())
        return f"it has no {more[0]}, which the new adapter has" if more else ""

    @torch.no_grad()
    def put(self, old: AdapterLayer, new: AdapterLayer | None, config: LoraConfig) -> None:
        assert isinstance(old, LowRank)
        if new is None:
            for registry, name, _ in old.registered.values():
                registry[name].data.zero_()
            return
        assert isinstance(new, LowRank)
        rank = max(old.r, new.r)
        if new.r > old.r:
            _grow(old, rank)
        for suffix, (registry, name, _) in old.registered.items():
            value = new.find(suffix)
            # Not into the parameter itself: autograd refuses to write into a leaf that is trained.
            own: torch.Tensor = registry[name].data
            own.zero_() if value is None else own.copy_(_filled_up(new, suffix, value, rank))
        old.dropout, old.initial_scale = new.dropout, new.initial_scale
        old.rescale(new.initial_scale)
        _name_rank(old, rank, config)

    def cannot_grow(self, layer: AdapterLayer, rank: int) -> str:
        if type(layer) not in (*_PLAIN, *_WITH_MAGNITUDES):
            return ""
        assert isinstance(layer, LowRank)
        if layer.r > rank:
            return f"its rank is {layer.r} already"
        groups = layer.groups if isinstance(layer, OnConvolution) else 1
        return f"it must be a multiple of the convolution's groups ({groups})" if rank % groups else ""

    @torch.no_grad()
    def grow(self, layer: AdapterLayer, rank: int | None, config: LoraConfig) -> bool:
        if type(layer) not in (*_PLAIN, *_WITH_MAGNITUDES):
            return False
        assert isinstance(layer, LowRank)
        if rank is not None and rank != layer.r:
            _grow(layer, rank)
            _name_rank(layer, rank, config)
        if not isinstance(layer.scale, torch.Tensor):
            dtype = torch.float64 if layer.a.dtype is torch.float64 else torch.float32
            layer.scale = torch.tensor(layer.scale, dtype=dtype, device=layer.a.device)
        return True

    def stated(self, config: LoraConfig, layers: Mapping[str, AdapterLayer]) -> dict[str, object]:
        found = {path: layer for path, layer in layers.items() if isinstance(layer, LowRank)}
        ranks = {path: layer.r for path, layer in found.items()}
        alphas = {path: _whole(layer.lora_alpha) for path, layer in found.items()}
        return {
            **_stated("r", "rank_pattern", config.r, config.rank_pattern, ranks),
            **_stated("lora_alpha", "alpha_pattern", config.lora_alpha, config.alpha_pattern, alphas),
        }


def _stated(
    field: str, pattern: str, general: float, single: Mapping[str, float], values: Mapping[str, float]
) -> dict[str, object]:
    """The two fields as they are where they say these values by path, else such that they do."""
    if all(value_for(single, path, general) == value for path, value in values.items()):
        return {field: general, pattern: dict(single)}
    most = Counter(values.values()).most_common(1)[0][0]
    # Anchored: the end of one path may be another path.
    return {field: most, pattern: {f"^{path}": value for path, value in values.items() if value != most}}


def _name_rank(layer: LowRank, rank: int, config: LoraConfig) -> None:
    """Let the layer say this rank, and the alpha with which that makes its scale."""
    layer.r = rank
    layer.lora_alpha = _whole(layer.initial_scale * (math.sqrt(rank) if config.use_rslora else rank))


def _whole(number: float) -> float:
    """`number` as an integer where rounding alone keeps it from being one."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number


def _grow(layer: LowRank, rank: int) -> None:
    """Give A and B this rank, with zeros where nothing was; they become other parameters."""
    for suffix in layer.factor_names:
        registry, name, _ = layer.registered[suffix]
        own = registry[name]
        filled = _filled_up(layer, suffix, own.data, rank)
        registry[name] = nn.Parameter(filled, requires_grad=own.requires_grad)


def _filled_up(layer: LowRank, suffix: str, value: torch.Tensor, rank: int) -> torch.Tensor:
    """A tensor of `layer` with zeros for the ranks up to `rank` that it does not have; itself where there are none."""
    if suffix not in layer.factor_names or rank == layer.r:
        return value
    groups = layer.groups if isinstance(layer, OnConvolution) else 1
    if suffix == layer.factor_names[0]:  # A (r, ...): each group of channels has its own ranks
        grouped = value.reshape(groups, -1, *value.shape[1:])
        missing = grouped.new_zeros(groups, (rank - layer.r) // groups, *value.shape[1:])
        return torch.cat([grouped, missing], dim=1).flatten(0, 1)
    missing = value.new_zeros(value.shape[0], (rank - layer.r) // groups, *value.shape[2:])
    return torch.cat([value, missing], dim=1)
