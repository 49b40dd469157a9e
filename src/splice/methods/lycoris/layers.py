"""What LoHa and LoKr share: both make a whole weight update out of small factors, on linear layers and convolutions.

Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", arXiv 2309.14859.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Protocol

import torch
from torch import nn

from splice.base.layers import features, kernel_size
from splice.kinds.convolution import as_convolution
from splice.kinds.effect import Forward
from splice.kinds.matching import value_for
from splice.kinds.weight_delta import WeightDelta
from splice.methods.targeted import check_positive


class LycorisFields(Protocol):
    """The fields that the configs of both have."""

    # Rank of the factors, at least 1, and the numerator of the scale alpha / r.
    r: int
    alpha: int
    # Values for single layers, by patterns of their paths.
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, int]
    # Probabilities with which rows of an update, or a whole update, are left out in training.
    rank_dropout: float
    module_dropout: float
    # Whether factors of convolutions have a core with the kernel's axes between them.
    use_effective_conv2d: bool


def check(config: LycorisFields) -> None:
    """Raise ValueError for ranks below 1."""
    check_positive(r=config.r, **{f"rank_pattern[{key!r}]": rank for key, rank in config.rank_pattern.items()})


def rank_of(config: LycorisFields, path: str) -> int:
    return value_for(config.rank_pattern, path, config.r)


def sizes(base: nn.Module) -> tuple[int, int, tuple[int, ...]]:
    """(in, out, kernel) of the weight; of a convolution, `in` is that of one group. A linear layer has no kernel."""
    (size_in, size_out), kernel = features(base), kernel_size(base)
    return (size_in // as_convolution(base).groups if kernel else size_in), size_out, kernel


def core_shape(config: LycorisFields, rank: int, kernel: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the tensor between two factors of a convolution, or None where they are a plain product."""
    if not config.use_effective_conv2d or math.prod(kernel) == 1:
        return None
    return (rank, rank, *kernel) if len(kernel) > 1 else (rank, rank, *kernel, 1)


def product(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """(out, in) from (out, r) and (r, in); with a core (r, r, *kernel): (out, in, *kernel) from (r, out) and (r, in)."""
    return a @ b if core is None else torch.einsum("ij...,ip,jq->pq...", core, a, b)


class LycorisLayer(WeightDelta):
    """The scale and the two kinds of dropout of LoHa and LoKr."""

    numbers = MappingProxyType(
        {**WeightDelta.numbers, "alpha": "alpha", "rank_dropout": "rank_dropout", "module_dropout": "module_dropout"}
    )
    # Whether what is left of a dropped update is scaled up.
    dropout_keeps_mean: bool = True

    def prepare(self, base: nn.Module, config: LycorisFields, path: str) -> None:
        super().prepare(base, config, path)
        self.r, self.alpha = rank_of(config, path), value_for(config.alpha_pattern, path, config.alpha)
        self.scale = self.initial_scale = self.alpha / self.r
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        if self.training and self.module_dropout and not bool(torch.rand(1) > self.module_dropout):
            y: torch.Tensor = inner(x)
            return y
        return super().around(x, inner)

    def directly(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.training and self.rank_dropout else super().directly(x)

    def dropped(self, update: torch.Tensor) -> torch.Tensor:
        """`update` without some of its rows. The name is the field's; it drops outputs, not ranks."""
        if not self.rank_dropout:
            return update
        kept = (torch.rand(update.shape[0], device=update.device) > self.rank_dropout).to(update.dtype)
        if self.dropout_keeps_mean:
            kept = kept / kept.mean()
        return update * kept.view(-1, *(1 for _ in update.shape[1:]))


def draw(tensors: dict[str, torch.Tensor], zero: tuple[str, ...] = ()) -> None:
    """Fill new tensors, in their order; those named in `zero` with zeros."""
    for name, tensor in tensors.items():
        if name in zero:
            nn.init.zeros_(tensor)
        else:
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
