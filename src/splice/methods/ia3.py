"""(IA)³: one trained factor for every output of a layer, or, in feed-forward blocks, for every input.

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv 2205.05638,
section 3.3: `y = l * base(x)` (the bias included), or `y = base(l * x)`. Several active adapters multiply.
Which layers scale their input is no part of the checkpoint: it follows from `feedforward_modules` in the config.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from splice.base.layers import LayerKind, features, kernel_size, kind_of
from splice.base.weight_access import bias_of
from splice.checkpoint.patterns import expression
from splice.checkpoint.types import PeftType
from splice.kinds.as_one import Alike
from splice.kinds.casting import cast_to
from splice.kinds.combining import Summed
from splice.kinds.convolution import as_convolution
from splice.kinds.effect import Action
from splice.kinds.layer import AdapterLayer
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.methods.default_targets import IA3_FEEDFORWARD, IA3_TARGETS
from splice.methods.targeted import Targeted


@dataclass
class IA3Config(Targeted):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: `feedforward_modules` names layers that `target_modules` does not.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.IA3

    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # Targets whose input is scaled, not their output: ends of paths, or a regular expression for whole paths; None for
    # those that are usual for the base's `model_type`.
    feedforward_modules: list[str] | set[str] | str | None = None
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides, and sets this field.
    fan_in_fan_out: bool = False
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Whether the factors l start at 1, so that nothing changes at first; otherwise they are drawn from N(0, 1).
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, list):
            self.feedforward_modules = set(self.feedforward_modules)
        inputs, targets = self.feedforward_modules, self.target_modules
        if isinstance(inputs, set) and isinstance(targets, set):
            # Also the end of a target: "all-linear" is saved as whole paths.
            others = sorted(name for name in inputs if not any(target.endswith(name) for target in targets))
            if others:
                raise ValueError(
                    f"`feedforward_modules` should be a subset of `target_modules`; {others} are no targets."
                )

    def computed(self) -> dict[str, object]:
        # None is filled in by what is usual for the base.
        return {} if self.feedforward_modules is None else {"feedforward_modules": self.feedforward_modules}


def scales_input(config: IA3Config, path: str) -> bool:
    """Whether the adapter scales what goes into the layer at `path`, rather than what comes out."""
    names = config.feedforward_modules
    if isinstance(names, str):
        return expression(names, names, "feedforward_modules").fullmatch(path) is not None
    # Plain suffixes, as in the reference: "lin" is the end of "xlin" too.
    return path.endswith(tuple(names or ()))


class IA3(AdapterLayer):
    """What (IA)³ on every kind of layer shares: the vector l, and what it multiplies."""

    mergeable = True
    ia3_l = Held()

    def prepare(self, base: nn.Module, config: IA3Config, path: str) -> None:
        self.is_feedforward = scales_input(config, path)
        self.action = Action.SCALES_INPUT if self.is_feedforward else Action.SCALES_OUTPUT
        self.keeps_input = not self.is_feedforward
        self.scales_bias = not self.is_feedforward and bias_of(base) is not None

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: IA3Config) -> None:
        (nn.init.ones_ if config.init_ia3_weights else nn.init.normal_)(tensors["ia3_l"])

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, an input or output of the layer, with its features scaled, in its own dtype."""
        raise NotImplementedError

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(x) if self.is_feedforward else x

    def after(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.is_feedforward else self.scaled(y)

    @property
    def changed_names(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.scales_bias else ("weight",)

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight, change = tensors["weight"], self.ia3_l - 1
        found = {"weight": weight * self.for_weight(change, weight)}
        return {**found, "bias": tensors["bias"] * change.flatten()} if self.scales_bias else found

    def for_weight(self, vector: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`vector`, of the shape of l, in one that multiplies `weight`: (out, in), or (out, in / groups, *kernel)."""
        raise NotImplementedError


class IA3Layer(Alike, IA3):
    """(IA)³ on a linear layer, stored either way round; the vector is (out, 1), or (1, in) where it scales the input."""

    least, broadcasts = 2, True

    @classmethod
    def slots(cls, base: nn.Module, config: IA3Config, path: str) -> dict[str, Slot]:
        size_in, size_out = features(base)
        return {"ia3_l": Slot((1, size_in) if scales_input(config, path) else (size_out, 1))}

    @classmethod
    def resolved(cls, base: nn.Module, config: IA3Config) -> dict[str, object]:
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    def likeness(self) -> Hashable:
        return self.is_feedforward

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        row = self.ia3_l if self.is_feedforward else self.ia3_l.mT
        return (cast_to(x, row) * (row if x.dim() > 1 else row.flatten())).to(x.dtype)

    def for_weight(self, vector: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return vector


class IA3Conv(IA3):
    """(IA)³ on a convolution: one factor for every channel, (1, channels, 1, 1)."""

    @classmethod
    def slots(cls, base: nn.Module, config: IA3Config, path: str) -> dict[str, Slot]:
        size_in, size_out = features(base)
        channels = size_in if scales_input(config, path) else size_out
        return {"ia3_l": Slot((1, channels, *(1,) * len(kernel_size(base))))}

    def prepare(self, base: nn.Module, config: IA3Config, path: str) -> None:
        super().prepare(base, config, path)
        self.groups = as_convolution(base).groups

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        # Without its first dimension, so that it multiplies an input without a batch as well.
        return (cast_to(x, self.ia3_l) * self.ia3_l[0]).to(x.dtype)

    def for_weight(self, vector: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not self.is_feedforward:
            return vector.transpose(0, 1)
        # Each group of outputs reads its own slice of the inputs.
        slices = vector.reshape(self.groups, -1, *vector.shape[2:])
        return slices.repeat_interleave(weight.shape[0] // self.groups, dim=0)


METHOD = register(
    Method(
        name=PeftType.IA3,
        summary="Multiplies each output of a layer by a trained factor, or, in feed-forward blocks, each input.",
        config=IA3Config,
        prefix="ia3_",
        tensor_names=frozenset({"ia3_l"}),
        layers=MappingProxyType(
            {
                LayerKind.LINEAR: IA3Layer,
                LayerKind.TRANSPOSED_LINEAR: IA3Layer,
                LayerKind.CONV2D: IA3Conv,
                LayerKind.CONV3D: IA3Conv,
            }
        ),
        default_targets=IA3_TARGETS,
        default_modules=MappingProxyType({"feedforward_modules": IA3_FEEDFORWARD}),
        combine=Summed(),
        paper="arXiv 2205.05638",
    )
)
