"""Trained copies of whole modules (`modules_to_save`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from splice.base.bare import bare_copy, own_tensors
from splice.base.dense_twin import tensors_to_copy, twins_in, values_to_copy
from splice.base.foreign_models import full_shape
from splice.base.sharding import is_divided
from splice.config import PeftConfig
from splice.errors import UnsupportedLayerError
from splice.kinds.effect import Effect, Forward
from splice.kinds.layer import AdapterLayer
from splice.kinds.names import CopyNames
from splice.kinds.slot import Role, Slot
from splice.kinds.tensors import Registered, Registry


class WholeModule(AdapterLayer):
    """A trained copy of a module, used in its place while the adapter is selected.

    The copy is made around the tensors it is given: nothing is copied only to be overwritten. A class of such copies says
    how their tensors are called.
    """

    names: CopyNames
    mergeable = True
    stands_in = True
    # The base has its own tensors to keep, so the copy goes on computing in its place.
    stays_merged = True
    module: nn.Module

    def __init__(
        self,
        base: nn.Module,
        config: PeftConfig,
        path: str,
        slots: Mapping[str, Slot],
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__(base, config, path, slots, {})
        own, front = dict(own_tensors(base)), self.names.front
        twins = twins_in(base)
        memo: dict[int, object] = dict(twins)
        for suffix, tensor in tensors.items():
            original = own.get(suffix.removeprefix(front))
            if original is None or twins:
                continue  # a tensor of a twin, or one that is put in place below
            given = type(tensor) is nn.Parameter or not isinstance(original, nn.Parameter)
            memo[id(original)] = tensor if given else nn.Parameter(tensor, requires_grad=False)
        self.module = twins.get(id(base)) or bare_copy(base, memo)
        self.entries[self.names.container] = self.module
        for suffix, tensor in tensors.items():
            parent, _, leaf = suffix.removeprefix(front).rpartition(".")
            holder = self.module.get_submodule(parent)
            registry: Registry = holder._parameters if leaf in holder._parameters else holder._buffers
            if twins:
                is_bare = leaf in holder._parameters and type(tensor) is not nn.Parameter
                registry[leaf] = nn.Parameter(tensor, requires_grad=False) if is_bare else tensor
            self.registered[suffix] = Registered(registry, leaf, slots[suffix])
        self.prepare_copy()

    def prepare_copy(self) -> None:
        """Work out what follows from the copy."""

    @classmethod
    def slots(cls, base: nn.Module, config: PeftConfig, path: str) -> dict[str, Slot]:
        if isinstance(base, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)):
            raise TypeError(f"modules_to_save cannot be applied to {path!r}: a {type(base).__name__} has no forward")
        if any(is_divided(tensor) for _, tensor in own_tensors(base)):
            raise UnsupportedLayerError(
                f"{path!r} cannot be saved whole: its tensors are divided among processes (FSDP, tensor parallelism), and "
                "a copy of it would be nobody's. Put the adapter on before the model is divided."
            )
        return {
            cls.names.front + name: Slot(
                tuple(full_shape(tensor)),
                Role.TRAINED if isinstance(tensor, nn.Parameter) else Role.BUFFER,
                dtype=tensor.dtype,
            )
            for name, tensor in tensors_to_copy(base)
        }

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: PeftConfig) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(values_to_copy(base, name.removeprefix(cls.names.front)).detach())

    def around(self, x: torch.Tensor, inner: Forward) -> object:
        return self.module(x)

    def wrapped(self, inner: Forward) -> Forward:
        return self.module

    def shown(self, base: nn.Module) -> dict[str, torch.Tensor]:
        # Only for those who read tensors instead of calling the layer: `shows` is False.
        return {name: p for name, p in self.module._parameters.items() if p is not None}

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}  # the copy goes on computing while its adapter is merged

    @property
    def changed_names(self) -> tuple[str, ...]:
        return ()

    def conflict(self, other: Effect) -> str:
        return "both replace it with a copy of their own" if isinstance(other, WholeModule) else ""


class SavedModule(WholeModule):
    """A copy that `modules_to_save` asks for."""

    names = CopyNames("modules_to_save", "original_module.")
