"""DeLoRA: a low-rank update whose rank-one parts have the same norm, bounded by one trained number.

Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation", arXiv 2503.18225, section 3. With w the norm of each
column of the base's weight, and the norms of each row a of A and column b of B no less than 1e-4:
`y = base(x) + B (lambda / (r |a| |b|)) A (w * x)`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import LayerKind, features
from splice.checkpoint.types import PeftType
from splice.kinds.additive import Additive
from splice.kinds.as_one import Alike
from splice.kinds.casting import cast_to
from splice.kinds.dropout import dropout_of
from splice.kinds.matching import value_for
from splice.kinds.original import original_weight
from splice.kinds.registry import Method, register
from splice.kinds.slot import Role, Slot
from splice.kinds.tensors import Held
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted, check_positive

# No norm of a row of A or of a column of B is taken for less: B starts at zero.
_LEAST_NORM = 1e-4


@dataclass
class DeloraConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.DELORA
    rank_field = "r"
    pattern_fields = MappingProxyType({"rank_pattern": "r", "lambda_pattern": "delora_lambda"})

    # Rank r, at least 1.
    r: int = 8
    # The value that lambda starts at: the most that the update can be, in proportion to the weight's columns.
    delora_lambda: float = 15
    # Probability with which each input of the update is set to zero in training, 0 to 1; it drops no module.
    module_dropout: float = 0.0
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # Biases of the base to train with the adapter: "none", "all", or "delora_only" for those of adapted layers.
    bias: str = "none"
    # Whether B starts at zero, so that nothing changes at first; otherwise it is drawn as A is.
    init_weights: bool = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # Ranks of single layers: a regular expression for the end of a path -> its r. The first that matches counts.
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    # The same for the value that lambda starts at.
    lambda_pattern: dict[str, float] | None = field(default_factory=dict)
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None


def _check(config: DeloraConfig) -> None:
    check_positive(r=config.r, **{f"rank_pattern[{key!r}]": r for key, r in (config.rank_pattern or {}).items()})


def _rank(config: DeloraConfig, path: str) -> int:
    return value_for(config.rank_pattern or {}, path, config.r)


class DeloraLayer(Alike, Additive):
    """DeLoRA on a linear layer. The norms of the weight's columns are those of the base it was made on, and are stored."""

    delora_A, delora_B, delora_lambda, delora_w_norm = Held(), Held(), Held(), Held()
    numbers = MappingProxyType({"r": "r"})
    starts_from_weight = True

    @classmethod
    def slots(cls, base: nn.Module, config: DeloraConfig, path: str) -> dict[str, Slot]:
        (size_in, size_out), r = features(base), _rank(config, path)
        return {
            "delora_A": Slot((r, size_in)),
            "delora_B": Slot((size_out, r)),
            "delora_lambda": Slot((1,)),
            "delora_w_norm": Slot((size_in,), Role.BUFFER),
        }

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: DeloraConfig) -> None:
        nn.init.kaiming_uniform_(tensors["delora_A"], a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(tensors["delora_B"])
        else:
            nn.init.kaiming_uniform_(tensors["delora_B"], a=math.sqrt(5))
        nn.init.constant_(tensors["delora_lambda"], float(config.delora_lambda))
        weight = original_weight(base)
        # In the weight's own dtype, as those of trained checkpoints were rounded.
        tensors["delora_w_norm"].copy_(torch.ones(()) if weight.is_meta else weight.norm(dim=0))

    def prepare(self, base: nn.Module, config: DeloraConfig, path: str) -> None:
        self.r, self.dropout = _rank(config, path), config.module_dropout
        self.first_lambda = float(value_for(config.lambda_pattern or {}, path, config.delora_lambda))

    @torch.no_grad()
    def begin(self) -> None:
        self.delora_lambda.fill_(self.first_lambda)

    def likeness(self) -> Hashable:
        return None if isinstance(self.scale, torch.Tensor) else (self.scale, self.r)

    def strengths(self) -> torch.Tensor:
        """(r): what each rank-one part is multiplied with."""
        norms = self.delora_A.norm(dim=1).clamp(min=_LEAST_NORM) * self.delora_B.norm(dim=0).clamp(min=_LEAST_NORM)
        strengths: torch.Tensor = self.delora_lambda / (self.r * norms)
        return strengths

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.delora_A)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x * self.delora_w_norm, self.delora_A) * self.strengths(), self.delora_B)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return (self.delora_B * self.strengths()) @ (self.delora_A * self.delora_w_norm)


METHOD = register(
    Method(
        name=PeftType.DELORA,
        summary="Adds low-rank updates whose parts are normalised, and whose strength is one trained number for each layer.",
        config=DeloraConfig,
        prefix="delora_",
        tensor_names=frozenset({"delora_A", "delora_B", "delora_lambda", "delora_w_norm"}),
        layers=MappingProxyType({LayerKind.LINEAR: DeloraLayer}),
        layer_views=MappingProxyType({"delora_dropout": dropout_of}),
        default_targets=LORA_TARGETS,
        check=_check,
        names=MappingProxyType({"DeloraLinear": DeloraLayer}),
        paper="arXiv 2503.18225",
    )
)
