"""BEFT: a trained vector is added to what a layer gives, as a bias.

"BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes", arXiv 2509.15974: `y = base(x) + b`. The base's own
bias stays what it is, so without the adapter the base is exactly itself.
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
from splice.errors import warn
from splice.kinds.additive import Additive
from splice.kinds.as_one import Alike
from splice.kinds.casting import check_values
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.methods.default_targets import BEFT_TARGETS
from splice.methods.targeted import Targeted


@dataclass
class BeftConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.BEFT

    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`, the projections to values.
    target_modules: list[str] | set[str] | str | None = None
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Whether the vectors start at zero, so that nothing changes at first; otherwise they are drawn from N(0, 1).
    init_weights: bool = True


class BeftLayer(Alike, Additive):
    """BEFT on a linear layer: one vector, (1, out)."""

    least, broadcasts = 2, True
    numbers = MappingProxyType({})
    beft_bias = Held()

    @classmethod
    def slots(cls, base: nn.Module, config: BeftConfig, path: str) -> dict[str, Slot]:
        return {"beft_bias": Slot((1, features(base)[1]))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: BeftConfig) -> None:
        if bias_of(base) is None:
            warn("A layer has no bias of its own, so BEFT cannot be merged into it.")
        # Drawn in any case, as the reference does: of the numbers that come after it they are the same then.
        nn.init.normal_(tensors["beft_bias"])
        if config.init_weights:
            nn.init.zeros_(tensors["beft_bias"])

    @property
    def changed_names(self) -> tuple[str, ...]:
        return ("bias",)

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"bias": self.delta_bias()}  # of any layer with a bias, however it stores its weight

    def delta_bias(self) -> torch.Tensor:
        return self.beft_bias.flatten()

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        check_values(self.beft_bias, x)
        return x

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        return self.beft_bias if x.dim() > 1 else self.beft_bias.flatten()

    def likeness(self) -> Hashable:
        return None if isinstance(self.scale, torch.Tensor) else self.scale


METHOD = register(
    Method(
        name=PeftType.BEFT,
        summary="Adds a trained vector to what a layer gives, as a bias beside its own.",
        config=BeftConfig,
        prefix="beft_",
        tensor_names=frozenset({"beft_bias"}),
        layers=MappingProxyType({LayerKind.LINEAR: BeftLayer}),
        default_targets=BEFT_TARGETS,
        paper="arXiv 2509.15974",
    )
)
