"""RoAd: the outputs of a layer are rotated and scaled in pairs.

Liao and Monz, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability",
arXiv 2409.00119, section 3. In each group of G outputs number k and number k + G/2 are a pair; with `y = base(x)`, the bias
included: `y_k' = c_k y_k - s_k y_(k+G/2)` and `y_(k+G/2)' = c_(k+G/2) y_(k+G/2) + s_(k+G/2) y_k`, where c = alpha cos(theta)
and s = alpha sin(theta). The variants differ in how many of these numbers are trained ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from splice.base.layers import LayerKind, features
from splice.base.weight_access import bias_of
from splice.checkpoint.types import PeftType
from splice.kinds.as_one import Alike
from splice.kinds.casting import check_values
from splice.kinds.output_transform import OutputTransform
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted

# Twice the number of trained angles of a layer, by outputs: a pair shares one, has two, or has four.
_ANGLES: Mapping[str, int] = MappingProxyType({"road_1": 1, "road_2": 2, "road_4": 4})


@dataclass
class RoadConfig(Targeted):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: there is no such variant, or `group_size` is not an even number above 0.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.ROAD

    # How many angles and factors a pair of outputs has: one ("road_1"), two ("road_2") or four ("road_4").
    variant: str = "road_1"
    # G, how many outputs make a group: an even number that divides the outputs of each layer.
    group_size: int = 64
    # Whether nothing changes at first (angles 0, factors 1); otherwise they are drawn from N(0, 0.5) and N(1, 0.5).
    init_weights: bool = True
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in _ANGLES:
            raise ValueError(f"Invalid variant {self.variant!r} specified. Please choose from {list(_ANGLES)}.")
        if self.group_size <= 0 or self.group_size % 2:
            raise ValueError(f"The `group_size` must be divisible by 2 when using RoadLayer, got {self.group_size}.")

    def computed(self) -> dict[str, object]:
        return {"variant": self.variant, "group_size": self.group_size}


class RoadLayer(Alike, OutputTransform):
    """RoAd on a linear layer: an angle theta and a factor alpha for each pair, or several of them."""

    least, broadcasts = 2, True
    numbers = MappingProxyType({"variant": "variant", "group_size": "group_size"})
    road_theta, road_alpha = Held(), Held()

    @classmethod
    def slots(cls, base: nn.Module, config: RoadConfig, path: str) -> dict[str, Slot]:
        size_out = features(base)[1]
        if size_out % config.group_size:
            raise ValueError(
                f"{path}: the out_features of the base layer ({size_out}) must be divisible by `group_size` "
                f"({config.group_size}). Choose another one, or leave the layer out of the targets."
            )
        slot = Slot((size_out * _ANGLES[config.variant] // 2,))
        return {"road_theta": slot, "road_alpha": slot}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: RoadConfig) -> None:
        theta, alpha = tensors["road_theta"], tensors["road_alpha"]
        if config.init_weights:
            nn.init.zeros_(theta)
            nn.init.ones_(alpha)
        else:
            nn.init.normal_(theta, mean=0.0, std=0.5)
            nn.init.normal_(alpha, mean=1.0, std=0.5)

    def prepare(self, base: nn.Module, config: RoadConfig, path: str) -> None:
        self.variant, self.group_size = config.variant, config.group_size
        self.has_bias = bias_of(base) is not None

    def likeness(self) -> Hashable:
        return self.variant, self.group_size

    def coefficients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """c and s, each (groups, 2, G / 2) or, where the halves of a group share them, (groups, 1, G / 2)."""
        theta, alpha, half = self.road_theta, self.road_alpha, self.group_size // 2
        cosine, sine = alpha * theta.cos(), alpha * theta.sin()
        many = theta.shape[:-1]  # where it stands for several layers
        if self.variant == "road_4":  # for each group first what is kept of an output, then what comes of its partner
            return cosine.view(*many, -1, 2, 2, half).select(-3, 0), sine.view(*many, -1, 2, 2, half).select(-3, 1)
        shared = 1 if self.variant == "road_1" else 2
        return cosine.view(*many, -1, shared, half), sine.view(*many, -1, shared, half)

    def rotated(self, y: torch.Tensor) -> torch.Tensor:
        """`y` (..., out), in its dtype or that of the adapter's tensors, whichever is wider."""
        cosine, sine = self.coefficients()
        paired = y.reshape(*y.shape[:-1], y.shape[-1] // self.group_size, 2, self.group_size // 2)
        first, second = paired.unbind(-2)
        return (cosine * paired + sine * torch.stack((-second, first), -2)).flatten(-3)

    def transform_output(self, y: torch.Tensor) -> torch.Tensor:
        own = self.road_theta
        check_values(own, y)
        return self.rotated(y.to(own.dtype)).to(y.dtype)

    @property
    def changed_names(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.has_bias else ("weight",)

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Both are outputs: each column of the weight that of one input, and the bias that of none.
        weight = tensors["weight"].mT
        found = {"weight": (self.rotated(weight) - weight).mT}
        return {**found, "bias": self.rotated(tensors["bias"]) - tensors["bias"]} if self.has_bias else found


METHOD = register(
    Method(
        name=PeftType.ROAD,
        summary="Rotates and scales the outputs of a layer in pairs, by trained angles and factors.",
        config=RoadConfig,
        prefix="road_",
        tensor_names=frozenset({"road_theta", "road_alpha"}),
        layers=MappingProxyType({LayerKind.LINEAR: RoadLayer}),
        default_targets=LORA_TARGETS,
        paper="arXiv 2409.00119",
    )
)
