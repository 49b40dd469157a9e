"""LoRA on bare parameters (`target_parameters`): a module's own 2-d or 3-d tensors, such as stacked experts.

For a parameter of E experts, stored (E, out, in), with rank r for each: A is (r * E, in) with the rows of one expert next
to each other, B is (out, r * E) with the columns of one *rank* next to each other, and expert e gets `s * B_e A_e`. Where
the module says `is_transposed`, the parameter is stored (E, in, out).

Keys carry no parameter name: the parameter that the module registers last has `lora_A.weight`, the one before it
`base_layer.lora_A.weight`, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from splice.base.foreign_models import is_transposed
from splice.errors import counted
from splice.kinds.effect import Action, Forward
from splice.kinds.layer import AdapterLayer
from splice.kinds.matching import matching_parameters, value_for
from splice.kinds.names import BIAS, LayerNames, Names, Place
from splice.kinds.slot import Slot
from splice.methods.lora.config import LoraConfig


class _Target(NamedTuple):
    """One parameter of a module: its name, the front of its tensors' names, its geometry."""

    # Name of the parameter in its module.
    name: str
    # What stands before its tensors' names: `base_layer.`, once for each target registered after it.
    front: str
    # E, the number of experts stacked in it; 1 for a matrix.
    experts: int
    # Inputs of each expert.
    size_in: int
    # Outputs of each expert.
    size_out: int
    # r, the rank of each expert's update.
    rank: int
    # s, the factor of B A.
    scale: float
    # Whether it is stored as (E, in, out) instead of (E, out, in).
    transposed: bool

    def delta(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The update as the parameter is stored, from A (r * E, in) and B (out, r * E); of a matrix too with E in front."""
        a = a.reshape(self.experts, self.rank, self.size_in)
        b = b.reshape(self.size_out, self.rank, self.experts).permute(2, 0, 1)
        stacked = self.scale * (b @ a)
        return stacked.transpose(1, 2) if self.transposed else stacked


def _targets(base: nn.Module, config: LoraConfig, path: str) -> list[_Target]:
    names = matching_parameters(base, path, config.target_parameters or [])
    return [_target(base, config, path, name, len(names) - 1 - i) for i, name in enumerate(names)]


def _target(base: nn.Module, config: LoraConfig, path: str, name: str, depth: int) -> _Target:
    shape = tuple(base.get_parameter(name).shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"{path}.{name} has {counted(len(shape), 'dimension')}; LoRA on parameters needs 2 or 3")
    transposed = len(shape) == 3 and is_transposed(base)
    size_out, size_in = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    rank = value_for(config.rank_pattern, f"{path}.{name}", config.r)
    alpha = value_for(config.alpha_pattern, f"{path}.{name}", config.lora_alpha)
    scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    experts = shape[0] if len(shape) == 3 else 1
    return _Target(name, "base_layer." * depth, experts, size_in, size_out, rank, scale, transposed)


class _NestedNames(LayerNames):
    """One layer inside the other, as many as there are targeted parameters."""

    def place(self, suffix: str) -> Place:
        if suffix == BIAS:
            return super().place(suffix)
        front, tensor, rest = suffix.rpartition("lora_")
        first, _, leaf = rest.partition(".")
        return Place(f"{front}{tensor}{first}", leaf)


class LoraParameters(AdapterLayer):
    """The updates of all targeted parameters of one module; during its forward they read as W + update."""

    names: Names = _NestedNames()
    mergeable = True
    action = Action.ADDS
    linear_layout = False
    shows = True

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        found: dict[str, Slot] = {}
        for t in _targets(base, config, path):
            found[f"{t.front}lora_A.weight"] = Slot((t.rank * t.experts, t.size_in))
            found[f"{t.front}lora_B.weight"] = Slot((t.size_out, t.rank * t.experts))
        return found

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        self.targets = _targets(base, config, path)
        self.names = _NestedNames("base_layer." * len(self.targets))

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        for name, tensor in tensors.items():
            if name.endswith("lora_A.weight") or config.init_lora_weights is False:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
            else:
                nn.init.zeros_(tensor)

    def wrapped(self, inner: Forward) -> Forward:
        return inner  # the host calls it with the adapted parameters in place

    def shown(self, base: nn.Module) -> dict[str, torch.Tensor]:
        # As attributes: another adapter may show a parameter of its own, and then this one adds to that.
        current: dict[str, torch.Tensor] = {t.name: getattr(base, t.name) for t in self.targets}
        deltas = self.deltas(current)
        return {name: tensor + deltas[name].to(tensor.dtype) for name, tensor in current.items()}

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {}
        for t in self.targets:
            delta = t.delta(self.tensor(f"{t.front}lora_A.weight"), self.tensor(f"{t.front}lora_B.weight"))
            result[t.name] = delta.reshape(tensors[t.name].shape)
        return result

    @property
    def changed_names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.targets)
