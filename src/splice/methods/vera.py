"""VeRA: random matrices that all layers share, frozen, and two trained vectors for each layer.

Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454, section 3.1. With A (r, max in) and
B (max out, r) cut to the layer's size: `y = base(x) + b * (B (d * (A x)))`. A checkpoint holds A and B, or the seed of the
numbers they are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import LayerKind
from splice.checkpoint.types import PeftType
from splice.kinds.dropout import dropout_of
from splice.kinds.registry import Method, register
from splice.kinds.tensors import Held
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.projected import Projected, Projections, check
from splice.methods.targeted import Targeted


@dataclass
class VeraConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.VERA
    rank_field = "r"
    # Beside a regular expression as `target_modules`, `layers_to_transform` is no error here; it has no effect.
    index_needs_names: ClassVar[bool] = False

    # Rank r of the shared matrices A and B, at least 1.
    r: int = 256
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Seed of the random numbers in A and B.
    projection_prng_key: int = 0
    # Whether a checkpoint holds A and B; otherwise each load draws them again from the seed.
    save_projection: bool = True
    # Probability with which each input of A is set to zero in training, 0 to 1.
    vera_dropout: float = 0.0
    # The value that every element of the vector d starts at.
    d_initial: float = 0.1
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides, and sets this field.
    fan_in_fan_out: bool = False
    # Biases of the base to train with the adapter: "none", "all", or "vera_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Whether b starts at zero, so that nothing changes at first; otherwise b starts at 1, and d is drawn from N(0, 1).
    init_weights: bool = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None

    def computed(self) -> dict[str, object]:
        # Projections that a file holds are read from it.
        return {"projection_prng_key": None if self.save_projection else self.projection_prng_key}


class VeraProjections(Projections):
    """A (r, max in) and B (max out, r)."""

    A, B = Held("vera_A"), Held("vera_B")


class VeraLayer(Projected):
    """VeRA on a linear layer, stored either way round."""

    b, d = Held("vera_lambda_b"), Held("vera_lambda_d")
    projections = VeraProjections

    def prepare(self, base: nn.Module, config: VeraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.dropout = config.vera_dropout

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.matrices()
        return self.b * F.linear(self.d * F.linear(x, a), b)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        a, b = self.matrices()
        return (self.b[:, None] * b) @ (self.d[:, None] * a)


METHOD = register(
    Method(
        name=PeftType.VERA,
        summary="Adds to each layer an update of two random matrices that all layers share, scaled by two trained vectors.",
        config=VeraConfig,
        prefix="vera_lambda_",
        tensor_names=frozenset({"vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"}),
        layers=MappingProxyType({LayerKind.LINEAR: VeraLayer, LayerKind.TRANSPOSED_LINEAR: VeraLayer}),
        shared=VeraProjections,
        layer_views=MappingProxyType({"vera_dropout": dropout_of}),
        default_targets=MappingProxyType({**LORA_TARGETS, "phi": ["q_proj", "v_proj"]}),
        check=check,
        paper="arXiv 2310.11454",
    )
)
