"""LayerNorm tuning (Zhao et al., arXiv 2312.11420): trained copies of normalisation layers, or of any other module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from splice.base.layers import LayerKind
from splice.checkpoint.types import PeftType
from splice.kinds.module_copy import WholeModule
from splice.kinds.names import CopyNames
from splice.kinds.registry import Method, register
from splice.methods.default_targets import LN_TUNING_TARGETS
from splice.methods.targeted import Targeted


@dataclass
class LNTuningConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # Modules to train copies of: ends of paths, or a regular expression for whole paths; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | str | None = None
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | str | None = None  # type: ignore[assignment]

    method = PeftType.LN_TUNING

    def __post_init__(self) -> None:
        targets, excluded = self.target_modules, self.exclude_modules
        super().__post_init__()
        self.target_modules, self.exclude_modules = targets, excluded  # lists stay lists here


class TunedModule(WholeModule):
    """A copy of the target with tensors of its own; those of a checkpoint are all that the copy has."""

    names = CopyNames("ln_tuning_layers", "base_layer.", "ln_tuning_layers.")
    # A layer of a method, whose weight is the base's outside of a call.
    stands_in = False

    def prepare_copy(self) -> None:
        # A layer with nothing but parameters of its own, as norms are, can hold those of the copy. Of any other the copy
        # stays in its place: buffers and modules below cannot be put back without a copy of the base's.
        self.stays_merged = bool(self.module._modules or self.module._buffers)

    @property
    def changed_names(self) -> tuple[str, ...]:
        return () if self.stays_merged else tuple(name for name, p in self.module._parameters.items() if p is not None)

    def replaced(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: self.module.get_parameter(name).detach().clone() for name in self.changed_names}


METHOD = register(
    Method(
        name=PeftType.LN_TUNING,
        summary="Trains copies of normalisation layers, or of any other modules, and uses them in their place.",
        config=LNTuningConfig,
        prefix="ln_tuning_",
        tensor_names=frozenset({"ln_tuning_layers"}),
        layers=MappingProxyType(dict.fromkeys(LayerKind, TunedModule)),
        other_layer=TunedModule,
        default_targets=LN_TUNING_TARGETS,
        exclusive=True,
        paper="arXiv 2312.11420",
    )
)
