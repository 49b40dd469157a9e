"""VeRA: random matrices that all layers share, frozen, and two trained vectors for each layer.

Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454, section 3.1. With A (r, max in) and
B (max out, r) cut to the layer's size: `y = base(x) + b * (B (d * (A x)))`. A checkpoint holds A and B, or the seed of the
numbers they are made of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.dense import dtype_of
from splice.base.layers import LayerKind, features, kind_of
from splice.checkpoint.types import PeftType
from splice.kinds.additive import Additive
from splice.kinds.layer import HALVES, cast_to
from splice.kinds.registry import Method, register
from splice.kinds.shared import SharedTensors
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import TargetedConfig, check_positive


@dataclass
class VeraConfig(TargetedConfig):
    """Fields and defaults of the reference, in its order."""

    method: ClassVar[PeftType] = PeftType.VERA
    index_needs_names: ClassVar[bool] = False

    r: int = 256
    target_modules: list[str] | set[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


def _check(config: VeraConfig) -> None:
    check_positive(r=config.r)


class VeraProjections(SharedTensors):
    """A and B, as large as the largest of the targets."""

    vera_A: torch.Tensor
    vera_B: torch.Tensor
    repeated_on_layers = True
    frozen = frozenset({"vera_A", "vera_B"})

    @classmethod
    def shapes(cls, targets: Sequence[tuple[str, nn.Module]], config: VeraConfig) -> dict[str, tuple[int, ...]]:
        sizes = [features(base) for _, base in targets]
        return {
            "vera_A": (config.r, max((size_in for size_in, _ in sizes), default=0)),
            "vera_B": (max((size_out for _, size_out in sizes), default=0), config.r),
        }

    @classmethod
    def is_stored(cls, config: VeraConfig) -> bool:
        return config.save_projection

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: VeraConfig) -> None:
        source, own = torch.Generator().manual_seed(config.projection_prng_key), dtype_of(base)
        for name in ("vera_A", "vera_B"):
            tensor = tensors[name]
            bound = math.sqrt(6 / max(tensor.shape[1], 1))
            tensor.uniform_(-bound, bound, generator=source)
            if own in HALVES:  # rounded to the base's precision, also where they are held in another one
                tensor.copy_(tensor.to(own))


class VeraLayer(Additive):
    """VeRA on a linear layer, stored either way round."""

    vera_lambda_b: nn.Parameter
    vera_lambda_d: nn.Parameter
    uses_shared = True

    @classmethod
    def slots(cls, base: nn.Module, config: VeraConfig, path: str) -> dict[str, tuple[int, ...]]:
        return {"vera_lambda_b": (features(base)[1],), "vera_lambda_d": (config.r,)}

    @classmethod
    def resolved(cls, base: nn.Module, config: VeraConfig) -> dict[str, Any]:
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    def prepare(self, base: nn.Module, config: VeraConfig, path: str) -> None:
        self.sizes = features(base)
        self.r = config.r
        self.dropout = config.vera_dropout

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: VeraConfig) -> None:
        b, d = tensors["vera_lambda_b"], tensors["vera_lambda_d"]
        if config.init_weights:
            nn.init.zeros_(b)
            nn.init.constant_(d, config.d_initial)
        else:
            nn.init.ones_(b)
            nn.init.normal_(d)

    def projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r), on the device of this layer and in its dtype."""
        shared: Any = self.shared[0]
        size_in, size_out = self.sizes
        own = self.vera_lambda_d
        return shared.vera_A[:, :size_in].to(own), shared.vera_B[:size_out].to(own)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.vera_lambda_d)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.projections()
        return self.vera_lambda_b * F.linear(self.vera_lambda_d * F.linear(x, a), b)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        a, b = self.projections()
        return (self.vera_lambda_b[:, None] * b) @ (self.vera_lambda_d[:, None] * a)


METHOD = register(
    Method(
        name=PeftType.VERA,
        config=VeraConfig,
        prefix="vera_lambda_",
        tensor_names=frozenset({"vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"}),
        layers=MappingProxyType({LayerKind.LINEAR: VeraLayer, LayerKind.TRANSPOSED_LINEAR: VeraLayer}),
        shared=VeraProjections,
        default_targets=MappingProxyType({**LORA_TARGETS, "phi": ["q_proj", "v_proj"]}),
        check=_check,
        paper="arXiv 2310.11454",
    )
)
