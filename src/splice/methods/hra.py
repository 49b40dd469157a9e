"""HRA: the input of a layer is reflected r times, each time at the plane that a trained vector stands on.

Yuan et al., "Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
arXiv 2405.17484, section 3. With u_i the columns of a trained matrix, each at length 1: `W' = W H`, where H is the product of
`I - 2 u_i u_i^T`, from the first to the last. With orthogonal vectors (`apply_GS`, by Gram-Schmidt) `H = I - 2 Q Q^T`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from splice.base.layers import LayerKind, features
from splice.checkpoint.types import PeftType
from splice.errors import warn
from splice.kinds.as_one import Alike
from splice.kinds.casting import cast_to
from splice.kinds.input_transform import InputTransform
from splice.kinds.layer import AdapterLayer
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.kinds.weight_transform import WeightTransform
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.rotations import flat_inputs
from splice.methods.targeted import Targeted, check_positive


@dataclass
class HRAConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.HRA
    rank_field = "r"

    # r, the number of reflections: even, so that they can cancel in pairs at first.
    r: int = 8
    # Whether the vectors are made orthogonal first, by Gram-Schmidt.
    apply_GS: bool = False
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # Whether the vectors start in equal pairs, so that nothing changes at first; otherwise all are random.
    init_weights: bool = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # Biases of the base to train with the adapter: "none", "all", or "hra_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None

    def computed(self) -> dict[str, object]:
        return {"apply_GS": self.apply_GS}


def _check(config: HRAConfig) -> None:
    check_positive(r=config.r)


class HRA(AdapterLayer):
    """The reflections, on whatever they act."""

    numbers = MappingProxyType({"hra_r": "hra_r", "hra_apply_GS": "orthogonal"})
    hra_u = Held()

    @classmethod
    def size(cls, base: nn.Module, path: str) -> int:
        """How many values of the layer at `path` are reflected together.

        Raises:
            ValueError: the layer cannot be adapted.
        """
        raise NotImplementedError

    @classmethod
    def slots(cls, base: nn.Module, config: HRAConfig, path: str) -> dict[str, Slot]:
        return {"hra_u": Slot((cls.size(base, path), config.r))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: HRAConfig) -> None:
        vectors, paired = tensors["hra_u"], config.init_weights and config.r % 2 == 0
        if paired and config.apply_GS:
            raise ValueError(
                "`apply_GS` cannot start from equal pairs of vectors (init_weights=True with an even r), of which "
                "Gram-Schmidt leaves zeros: the output would be NaN. Set init_weights=False."
            )
        if config.init_weights and not paired:
            warn(
                f"The symmetric initialization can only be performed when r is even, and r is {config.r}: it starts random."
            )
        drawn = vectors.new_empty(len(vectors), config.r // 2) if paired else vectors
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        if paired:
            vectors.copy_(drawn.repeat_interleave(2, dim=1))

    def prepare(self, base: nn.Module, config: HRAConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.hra_r, self.orthogonal = config.r, config.apply_GS

    def reflected(self, x: torch.Tensor, forwards: bool) -> torch.Tensor:
        """`x H` where `forwards`, else `x H^T`, for rows `x` (..., size) in the dtype of the vectors or a wider one."""
        own = self.hra_u
        wide = own if own.dtype in (torch.float32, torch.float64) else own.float()
        if self.orthogonal:
            # What Gram-Schmidt gives, up to signs that fall out.
            vectors: torch.Tensor = torch.linalg.qr(wide).Q
            turned = 2 * vectors.T
        else:
            # No product of reflections one after the other: with T^-1 the part of U^T U above its diagonal and 1/2 on it,
            # H is `I - U T U^T` (Joffrain et al., "Accumulating Householder transformations, revisited", 2006).
            vectors = wide / wide.norm(dim=0)
            inverse = (vectors.T @ vectors).triu(1) + 0.5 * torch.eye(self.hra_r, dtype=wide.dtype, device=wide.device)
            inverse = inverse if forwards else inverse.T
            turned = torch.linalg.solve_triangular(inverse, vectors.T, upper=forwards)
        return x - (x @ vectors.to(x.dtype)) @ turned.to(x.dtype)

    def for_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """`W H`, in the shape of `weight`, and in its dtype or a wider one."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return self.reflected(wide.flatten(1), forwards=True).view_as(wide)


class HRALayer(Alike, HRA, InputTransform):
    """HRA on a linear layer: `x W'^T = (x H^T) W^T`, so the last of several adapters is the first that the input meets."""

    first_outside = False

    @classmethod
    def size(cls, base: nn.Module, path: str) -> int:
        return features(base)[0]

    def likeness(self) -> Hashable:
        return self.hra_r, self.orthogonal

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        return self.reflected(cast_to(x, self.hra_u), forwards=False).to(x.dtype)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return self.for_weight(weight) - weight


class HRAConv(HRA, WeightTransform):
    """HRA on a two-dimensional convolution: each output's kernel is reflected as a whole."""

    @classmethod
    def size(cls, base: nn.Module, path: str) -> int:
        return flat_inputs(base, path, "HRA")

    def transformed(self, weight: torch.Tensor) -> torch.Tensor:
        return self.for_weight(weight)


METHOD = register(
    Method(
        name=PeftType.HRA,
        summary="Reflects the input of a layer several times, each time at a plane that a trained vector stands on.",
        config=HRAConfig,
        prefix="hra_",
        tensor_names=frozenset({"hra_u"}),
        layers=MappingProxyType({LayerKind.LINEAR: HRALayer, LayerKind.CONV2D: HRAConv}),
        default_targets=LORA_TARGETS,
        check=_check,
        names=MappingProxyType({"HRALinear": HRALayer, "HRAConv2d": HRAConv}),
        paper="arXiv 2405.17484",
    )
)
