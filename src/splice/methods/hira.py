"""HiRA: the update of a weight is the weight itself, multiplied elementwise by a low-rank matrix.

Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR 2025, section 3:
`W' = W * (1 + B A)`. Several adapters add up their products: `W' = W * (1 + B1 A1 + B2 A2)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.foreign_models import embed_scale
from splice.base.layers import LayerKind, features, kernel_size
from splice.checkpoint.types import PeftType
from splice.errors import UnsupportedFeatureError
from splice.kinds.casting import cast_to, check_values
from splice.kinds.convolution import as_convolution
from splice.kinds.dropout import dropout_of
from splice.kinds.layer import Config
from splice.kinds.matching import value_for
from splice.kinds.original import original_weight
from splice.kinds.reading import Checkpoint, Reading
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.kinds.weight_delta import WeightUpdate
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.elementwise import MOST_ROWS, product_with
from splice.methods.targeted import Targeted, check_positive


@dataclass
class HiraConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.HIRA
    rank_field = "r"
    pattern_fields = MappingProxyType({"rank_pattern": "r"})

    # Rank r of B A, at least 1.
    r: int = 32
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # Probability with which each input of the update is set to zero in training, 0 to 1; not on embeddings.
    hira_dropout: float = 0.0
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides.
    fan_in_fan_out: bool = False
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Whether B A starts at zero, so that nothing changes at first; "gaussian" draws A from N(0, 1/r^2) on linear layers.
    # False: both factors are drawn from N(0, 1).
    init_weights: bool | Literal["gaussian"] | None = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # Ranks of single layers: a regular expression for the end of a path -> its r. The first that matches counts.
    rank_pattern: dict[str, int] | None = field(default_factory=dict)


def _check(config: HiraConfig) -> None:
    check_positive(r=config.r, **{f"rank_pattern[{key!r}]": r for key, r in (config.rank_pattern or {}).items()})
    if isinstance(config.init_weights, str) and config.init_weights.lower() != "gaussian":
        raise ValueError(
            f"Unknown initialization init_weights={config.init_weights!r}; it is true, false or 'gaussian'"
        )


def _rank(config: HiraConfig, path: str) -> int:
    return value_for(config.rank_pattern or {}, path, config.r)


class Hira(WeightUpdate):
    """What HiRA on every kind of layer shares."""

    numbers = MappingProxyType({"r": "r"})

    def prepare(self, base: nn.Module, config: HiraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.r, self.dropout = _rank(config, path), config.hira_dropout

    def multiplier(self) -> torch.Tensor:
        """B A, in the shape of the weight: what it is multiplied with, and what comes of that is added to it."""
        raise NotImplementedError

    def update_of(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.multiplier()


class HiraLayer(Hira):
    """HiRA on a linear layer, stored either way round, or on a convolution, where A has the kernel's axes."""

    hira_A, hira_B = Held(), Held()

    @classmethod
    def slots(cls, base: nn.Module, config: HiraConfig, path: str) -> dict[str, Slot]:
        (size_in, size_out), kernel, r = features(base), kernel_size(base), _rank(config, path)
        if kernel and as_convolution(base).groups != 1:
            raise UnsupportedFeatureError(
                f"{path}: HiRA is not defined on a convolution with groups (here {as_convolution(base).groups}): exclude it "
                "with `exclude_modules`."
            )
        return {"hira_A": Slot((r, size_in, *kernel)), "hira_B": Slot((size_out, r, *(1 for _ in kernel)))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: HiraConfig) -> None:
        a, b = tensors["hira_A"], tensors["hira_B"]
        if not config.init_weights:
            nn.init.normal_(a)
            nn.init.normal_(b)
            return
        if isinstance(config.init_weights, str) and not kernel_size(base):
            nn.init.normal_(a, std=1 / len(a))
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)

    def applied(self, x: torch.Tensor) -> torch.Tensor | None:
        if len(x) > MOST_ROWS:
            return None
        weight, a, b = original_weight(self.base), self.hira_A, self.hira_B
        wide = torch.promote_types(weight.dtype, a.dtype)  # as the update is
        a, b = a.to(wide), b.to(wide)
        return product_with(weight.to(wide), b, a, cast_to(x, a))

    def multiplier(self) -> torch.Tensor:
        a, b = self.hira_A, self.hira_B
        return (b.flatten(1) @ a.flatten(1)).view(self.shape)


class HiraEmbedding(Hira):
    """HiRA on an embedding. Of one that multiplies what it looks up (Gemma), the update is not multiplied."""

    hira_embedding_A, hira_embedding_B = Held(), Held()

    @classmethod
    def slots(cls, base: nn.Module, config: HiraConfig, path: str) -> dict[str, Slot]:
        (vocabulary, dim), r = features(base), _rank(config, path)
        return {"hira_embedding_A": Slot((r, vocabulary)), "hira_embedding_B": Slot((dim, r))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: HiraConfig) -> None:
        a, b = tensors["hira_embedding_A"], tensors["hira_embedding_B"]
        nn.init.normal_(b) if config.init_weights else nn.init.normal_(a)
        nn.init.zeros_(a) if config.init_weights else nn.init.normal_(b)

    def prepare(self, base: nn.Module, config: HiraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.dropout = 0.0  # the input is token ids
        self.merges_exactly = embed_scale(base) is None

    def multiplier(self) -> torch.Tensor:
        return (self.hira_embedding_B @ self.hira_embedding_A).T

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        # Of the rows that are looked up alone: the whole multiplier is as large as the weight.
        a, b = self.hira_embedding_A, self.hira_embedding_B
        check_values(a, x)
        return F.embedding(x, original_weight(self.base)) * F.linear(F.embedding(x, a.T), b)


def _without_pattern(
    checkpoint: Checkpoint, config: Config, network: nn.Module, modules: Mapping[str, nn.Module]
) -> Reading | None:
    """The first adapter of a model has rank r on every layer, in the reference, whatever its `rank_pattern` says."""
    if not config.rank_pattern:
        return None
    note = f"`rank_pattern` was not followed when the adapter was made: its layers are read with r = {config.r}"
    return Reading(checkpoint, replace(config, rank_pattern={}), (note,))


METHOD = register(
    Method(
        name=PeftType.HIRA,
        summary="Multiplies each weight, elementwise, by one plus a low-rank matrix.",
        config=HiraConfig,
        prefix="hira_",
        tensor_names=frozenset({"hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"}),
        layers=MappingProxyType(
            {
                LayerKind.LINEAR: HiraLayer,
                LayerKind.TRANSPOSED_LINEAR: HiraLayer,
                LayerKind.EMBEDDING: HiraEmbedding,
                LayerKind.CONV1D: HiraLayer,
                LayerKind.CONV2D: HiraLayer,
                LayerKind.CONV3D: HiraLayer,
            }
        ),
        containers=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        layer_views=MappingProxyType({"hira_dropout": dropout_of}),
        default_targets=LORA_TARGETS,
        readings=(_without_pattern,),
        check=_check,
        paper="openreview TwJrTz9cRS",
    )
)
