"""RandLoRA: an update of full rank, as a sum of random matrices of low rank that are frozen, each scaled by trained numbers.

Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv 2502.00987, section 4. With the
smaller and the larger of a layer's two sizes m and M, and n = ceil(m / r) pairs of matrices A_j (r, m) and B_j (M, r), which
all layers share but for their sizes: `y = base(x) + alpha / r * (sum over j of B_j L_j A_j G_j) x`, L and G being diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

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
from splice.kinds.registry import Method, register
from splice.kinds.shared import SharedTensors, UsesShared
from splice.kinds.slot import Role, Slot
from splice.kinds.tensors import Held, gets_gradients
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted, check_positive


@dataclass
class RandLoraConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.RANDLORA
    rank_field = "r"
    scale_fields = ("randlora_alpha", "r")
    # Beside a regular expression as `target_modules`, `layers_to_transform` is no error here; it has no effect.
    index_needs_names: ClassVar[bool] = False

    # Rank r of each of the random matrices, at least 1. The smaller it is, the more of them there are, and the more is
    # trained.
    r: int = 32
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Seed of the random numbers in A and B.
    projection_prng_key: int = 0
    # Whether a checkpoint holds A and B, once for all and once for each layer; otherwise each load draws them again.
    save_projection: bool = True
    # Whether the matrices are of -1, 0 and 1, of which two thirds are 0.
    sparse: bool = False
    # The same with more zeros: all but one of the square root of the smaller size of A and B.
    very_sparse: bool = False
    # Probability with which each input of the update is set to zero in training, 0 to 1.
    randlora_dropout: float = 0.0
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides, and sets this field.
    fan_in_fan_out: bool = False
    # alpha, the numerator of the scale alpha / r.
    randlora_alpha: int = 640
    # Biases of the base to train with the adapter: "none", "all", or "randlora_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Whether L starts at zero, so that nothing changes at first; otherwise it is drawn from N(0, 1).
    init_weights: bool = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list on a layer's
    # path, which must lie inside another module.
    layers_pattern: str | None = None

    def computed(self) -> dict[str, object]:
        drawn = None if self.save_projection else (self.projection_prng_key, self.sparse, self.very_sparse)
        return {"randlora_alpha": self.randlora_alpha, "projection_prng_key": drawn}


def _check(config: RandLoraConfig) -> None:
    check_positive(r=config.r)


class RandLoraBases(SharedTensors):
    """A (r, 1, m) and B (M, n, r), as large as the largest of the targets."""

    randlora_A, randlora_B = Held(), Held()
    written_on_layers = frozenset({"randlora_A", "randlora_B"})

    @classmethod
    def shared_slots(cls, targets: Sequence[tuple[str, nn.Module]], config: RandLoraConfig) -> dict[str, Slot]:
        sizes = [features(base) for _, base in targets]
        largest = [max((size[end] for size in sizes), default=0) for end in (0, 1)]
        small, large = min(largest), max(largest)
        shapes = {"randlora_A": (config.r, 1, small), "randlora_B": (large, math.ceil(small / config.r), config.r)}
        return {suffix: Slot(shape, Role.BUFFER, config.save_projection) for suffix, shape in shapes.items()}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: RandLoraConfig) -> None:
        source, own = torch.Generator().manual_seed(config.projection_prng_key), dtype_of(base)
        a, b = tensors["randlora_A"], tensors["randlora_B"]
        if config.sparse or config.very_sparse:
            every = math.sqrt(min(b.shape[0], a.shape[2])) if config.very_sparse else 3
            drawn = [_ternary(tensor, every, source) for tensor in (a, b)]
        else:
            # In bfloat16, as in the reference, and each part of B by itself: it is what adapters were trained with.
            drawn = [_uniform(a.shape, source)]
            drawn.append(torch.cat([_uniform(b[:, :1].shape, source) for _ in range(b.shape[1])], dim=1))
        for tensor, values in zip((a, b), drawn):
            values = values / values.std()
            tensor.copy_(values.to(own) if own in HALVES else values)


def _uniform(shape: Sequence[int], source: torch.Generator) -> torch.Tensor:
    bound = 1 / math.sqrt(max(math.prod(shape[1:]), 1))
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=source)


def _ternary(like: torch.Tensor, every: float, source: torch.Generator) -> torch.Tensor:
    """-1 and 1 in one place of `every`, and 0 in all others."""
    drawn = torch.rand(like.shape, generator=source)
    return (drawn > 1 - 1 / (2 * every)).float() - (drawn < 1 / (2 * every)).float()


class RandLoraLayer(UsesShared, Additive):
    """RandLoRA on a linear layer, stored either way round."""

    randlora_lambda, randlora_gamma = Held(), Held()

    @classmethod
    def slots(cls, base: nn.Module, config: RandLoraConfig, path: str) -> dict[str, Slot]:
        small = min(features(base))
        count = math.ceil(small / config.r)
        return {"randlora_lambda": Slot((config.r, count)), "randlora_gamma": Slot((count, small))}

    @classmethod
    def resolved(cls, base: nn.Module, config: RandLoraConfig) -> dict[str, object]:
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    def prepare(self, base: nn.Module, config: RandLoraConfig, path: str) -> None:
        self.sizes = features(base)
        self.r = config.r
        self.scale = config.randlora_alpha / config.r
        self.dropout = config.randlora_dropout

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: RandLoraConfig) -> None:
        scales, gamma = tensors["randlora_lambda"], tensors["randlora_gamma"]
        if config.init_weights:
            nn.init.zeros_(scales)
            nn.init.constant_(gamma, 1 / max(gamma.shape))
        else:
            nn.init.normal_(scales)
            nn.init.constant_(gamma, 1 / max(features(base)))

    def update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of the unscaled update, (n r, in) and (out, n r)."""
        # Rows of the one run through the ranks and columns of the other through the matrices first. They would pair in
        # another way in the paper; checkpoints are trained with this one.
        small, b = self._bases()
        a = (self.randlora_lambda[:, :, None] * small * self.randlora_gamma).flatten(0, 1)
        return (a, b) if self.sizes[0] == a.shape[1] else (b.T, a.T)

    def _bases(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, 1, m) and B (M, n r), as large as they are used here."""
        (shared,), gamma = self.shared, self.randlora_gamma
        assert isinstance(shared, RandLoraBases)
        count, small = gamma.shape
        a, b = shared.randlora_A[:, :, :small], shared.randlora_B[: max(self.sizes), :count]
        return a.to(gamma), b.to(gamma).flatten(1)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.randlora_lambda)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # About here both ways take as long. For one row it is 2 to 15 times faster not to make the one factor, whose size is
        # that of the layer. With gradients the factors are made: trajectories of training depend on the last bits.
        if len(rows) <= self.r and not gets_gradients(self):
            return self._directly(rows).view(*x.shape[:-1], self.sizes[1])
        first, second = self.update()
        return F.linear(F.linear(x, first), second)

    def _directly(self, x: torch.Tensor) -> torch.Tensor:
        """The unscaled update for rows `x` (rows, in): (rows, out), without the factors."""
        scales, gamma, (a, b) = self.randlora_lambda, self.randlora_gamma, self._bases()
        (r, count), small = scales.shape, gamma.shape[1]
        if self.sizes[0] == small:
            hidden = torch.mm((x.unsqueeze(1) * gamma).flatten(0, 1), a[:, 0].t()).view(len(x), count, r)
            return torch.mm((hidden.transpose(1, 2) * scales).flatten(1), b.t())
        hidden = torch.mm(x, b).view(len(x), r, count) * scales
        outputs = torch.mm(hidden.transpose(1, 2).reshape(-1, r), a[:, 0])
        return (outputs.view(len(x), count, small) * gamma).sum(1)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        first, second = self.update()
        return self.scale * (second @ first)


METHOD = register(
    Method(
        name=PeftType.RANDLORA,
        summary="Adds to a layer an update of full rank: random matrices that all layers share, scaled by trained numbers.",
        config=RandLoraConfig,
        prefix="randlora_",
        tensor_names=frozenset({"randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"}),
        layers=MappingProxyType({LayerKind.LINEAR: RandLoraLayer, LayerKind.TRANSPOSED_LINEAR: RandLoraLayer}),
        shared=RandLoraBases,
        layer_views=MappingProxyType({"randlora_dropout": dropout_of}),
        default_targets=LORA_TARGETS,
        check=_check,
        paper="arXiv 2502.00987",
    )
)
