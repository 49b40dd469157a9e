"""Uni-LoRA: every entry of all factors of LoRA is one of the numbers in a single trained vector.

Li et al., "Uni-LoRA: One Vector is All You Need", arXiv 2506.00799, section 3. With theta (d), which all layers share, and
fixed indices i and scales s for each layer, of the shapes of A (r, in) and B (out, r):
`y = base(x) + (theta[i_B] s_B) (theta[i_A] s_A) x`. The scale of an entry is 1 / sqrt(n), where n entries of the adapter have
its index. Indices and scales follow from a seed and the sizes of all targets in their order; few checkpoints hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.dense import dtype_of
from splice.base.dtypes import HALVES
from splice.base.layers import LayerKind, features, kind_of
from splice.checkpoint.types import PeftType
from splice.kinds.additive import Additive
from splice.kinds.casting import cast_to
from splice.kinds.dropout import dropout_of
from splice.kinds.layout import LaidOut, Layout
from splice.kinds.registry import Method, register
from splice.kinds.shared import SHARED_PATH, SharedTensors
from splice.kinds.slot import Role, Slot
from splice.kinds.tensors import Held
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted, check_positive


@dataclass
class UniLoraConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.UNILORA
    rank_field = "r"

    # Rank r of the factors A and B, at least 1.
    r: int = 4
    # Seed of the places at which the numbers of theta stand.
    proj_seed: int = 42
    # d, how many numbers theta has, at least 1.
    theta_d_length: int = 256
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Probability with which each input of A is set to zero in training, 0 to 1.
    unilora_dropout: float = 0.0
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides, and sets this field.
    fan_in_fan_out: bool = False
    # Biases of the base to train with the adapter: "none", "all", or "unilora_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Theta starts with numbers between this one, which is above 0, and its negative.
    init_theta_d_bound: float = 0.02
    # Whether theta starts within that bound; otherwise it is drawn from N(0, 1).
    init_weights: bool = True
    # Whether a checkpoint holds indices and scales; otherwise each load works them out again from the seed.
    save_indices: bool = False
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(r=self.r, theta_d_length=self.theta_d_length)
        if not isinstance(self.proj_seed, int) or self.proj_seed < 0:
            raise ValueError(f"`proj_seed` should be a whole number of at least 0, got {self.proj_seed!r}")
        if not 0 <= self.unilora_dropout <= 1:
            raise ValueError(
                f"`unilora_dropout` should be between 0 and 1 but the value passed is {self.unilora_dropout}"
            )
        if self.init_theta_d_bound <= 0:
            raise ValueError(
                f"`init_theta_d_bound` should be a positive number but the value passed is {self.init_theta_d_bound}"
            )
        if self.bias not in ("none", "all", "unilora_only"):
            raise ValueError(
                f"`bias` should be one of 'none', 'all', 'unilora_only' but the value passed is {self.bias!r}"
            )

    def computed(self) -> dict[str, object]:
        # Indices that a file holds are read from it.
        return {"proj_seed": None if self.save_indices else self.proj_seed}


class UniLoraTheta(SharedTensors):
    """The trained vector."""

    unilora_theta_d = Held()

    @classmethod
    def shared_slots(cls, targets: Sequence[tuple[str, nn.Module]], config: UniLoraConfig) -> dict[str, Slot]:
        return {"unilora_theta_d": Slot((config.theta_d_length,))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: UniLoraConfig) -> None:
        theta, bound = tensors["unilora_theta_d"], config.init_theta_d_bound
        if config.init_weights:
            nn.init.uniform_(theta, -bound, bound)
        else:
            nn.init.normal_(theta)


# Suffix -> (indices or scales) of one layer.
_Drawn = dict[str, torch.Tensor]

# What was drawn for the layers of an adapter that is being made, until each of them has taken its own.
_drawn: WeakKeyDictionary[Layout, dict[str, _Drawn]] = WeakKeyDictionary()


def _draw(layout: Layout, config: UniLoraConfig) -> dict[str, _Drawn]:
    """Indices and scales of all layers, by path: as the reference draws them, in one go through all targets."""
    import numpy as np  # whose numbers these are; torch runs without it, and so does every other method

    shapes = {}
    for path, base in layout.targets.items():
        size_in, size_out = features(base)
        shapes[path] = {"A": (config.r, size_in), "B": (size_out, config.r)}
    total = sum(rows * columns for both in shapes.values() for rows, columns in both.values())
    source, length = np.random.default_rng(config.proj_seed), config.theta_d_length
    # Each index as often as every other one, or once more.
    flat = np.repeat(np.arange(length), total // length)
    rest = total % length
    if rest:
        flat = np.concatenate([flat, source.choice(length, size=rest, replace=False)])
    source.shuffle(flat)
    indices = torch.from_numpy(flat)
    scales = (1 / torch.bincount(indices, minlength=length).sqrt())[indices]
    found: dict[str, _Drawn] = {}
    start = 0
    for path, both in shapes.items():
        found[path] = {}
        for factor, (rows, columns) in both.items():
            part = slice(start, start + rows * columns)
            found[path][f"unilora_indices_{factor}"] = indices[part].view(rows, columns)
            found[path][f"unilora_scales_{factor}"] = scales[part].view(rows, columns)
            start = part.stop
    return found


class UniLoraLayer(LaidOut, Additive):
    """Uni-LoRA on a linear layer, stored either way round."""

    unilora_indices_A, unilora_indices_B = Held(), Held()
    unilora_scales_A, unilora_scales_B = Held(), Held()
    unilora_theta_d = Held()

    @classmethod
    def slots_in(cls, layout: Layout, base: nn.Module, config: UniLoraConfig, path: str) -> dict[str, Slot]:
        size_in, size_out = features(base)
        # The vector stands on each layer as well, and is everywhere the same one.
        slots = {"unilora_theta_d": Slot((config.theta_d_length,), stored=False)}
        for factor, shape in (("A", (config.r, size_in)), ("B", (size_out, config.r))):
            slots[f"unilora_indices_{factor}"] = Slot(
                shape, Role.BUFFER, config.save_indices, torch.int64, choices=(config.theta_d_length,)
            )
            slots[f"unilora_scales_{factor}"] = Slot(shape, Role.BUFFER, config.save_indices)
        return slots

    @classmethod
    def resolved(cls, base: nn.Module, config: UniLoraConfig) -> dict[str, object]:
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    @classmethod
    def initialise_in(
        cls, layout: Layout, path: str, tensors: dict[str, torch.Tensor], base: nn.Module, config: UniLoraConfig
    ) -> None:
        drawn = _drawn.setdefault(layout, {})
        if path not in drawn:  # the first layer, or one that is made again
            drawn.update(_draw(layout, config))
        own = dtype_of(base)
        for suffix, tensor in drawn.pop(path).items():
            # Rounded to the base's precision, also where they are held in another one.
            rounded = tensor.to(own) if own in HALVES and tensor.is_floating_point() else tensor
            tensors[suffix].copy_(rounded)

    def prepare(self, base: nn.Module, config: UniLoraConfig, path: str) -> None:
        self.r = config.r
        self.dropout = config.unilora_dropout

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r), on the device of this layer."""
        theta = self.unilora_theta_d.to(self.unilora_scales_A.device)
        a = theta[self.unilora_indices_A] * self.unilora_scales_A
        return a, theta[self.unilora_indices_B] * self.unilora_scales_B

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.unilora_theta_d)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.pair()
        return F.linear(F.linear(x, a), b)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        a, b = self.pair()
        return b @ a


def _groups(targets: Sequence[tuple[str, nn.Module]], config: UniLoraConfig) -> dict[str, dict[str, str]]:
    return {path: {"unilora_theta_d": SHARED_PATH} for path, _ in targets}


METHOD = register(
    Method(
        name=PeftType.UNILORA,
        summary="Adds to each layer a product of two factors whose entries are all numbers of one trained vector.",
        config=UniLoraConfig,
        prefix="unilora_",
        tensor_names=frozenset(
            {
                "unilora_theta_d",
                *(f"unilora_{what}_{factor}" for what in ("indices", "scales") for factor in "AB"),
            }
        ),
        layers=MappingProxyType({LayerKind.LINEAR: UniLoraLayer, LayerKind.TRANSPOSED_LINEAR: UniLoraLayer}),
        shared=UniLoraTheta,
        groups=_groups,
        layer_views=MappingProxyType({"unilora_dropout": dropout_of}),
        default_targets=LORA_TARGETS,
        paper="arXiv 2506.00799",
    )
)
