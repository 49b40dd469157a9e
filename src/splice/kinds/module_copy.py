"""What an adapter keeps as a whole: copies of modules (`modules_to_save`) and trained biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from splice.base.bare import bare_copy, own_tensors
from splice.config import PeftConfig
from splice.kinds.layer import AdapterLayer, Forward
from splice.kinds.light_module import LightModule


class WholeModule(AdapterLayer):
    """A trained copy of a module, used in its place while the adapter is selected.

    The copy is made around the tensors it is given: nothing is copied only to be overwritten.
    """

    base_infix = "original_module."
    mergeable = True
    stays_merged = True
    aliases = MappingProxyType({"modules_to_save": "module"})
    module: nn.Module
    # What stands before the names of the module's own tensors.
    front: ClassVar[str] = ""

    def __init__(self, base: nn.Module, config: PeftConfig, path: str, tensors: Mapping[str, torch.Tensor]) -> None:
        LightModule.__init__(self)
        self._parameters["trained_bias"] = None
        own = dict(own_tensors(base))
        memo: dict[int, Any] = {}
        for name, tensor in tensors.items():
            original = own[name.removeprefix(self.front)]
            given = type(tensor) is nn.Parameter or not isinstance(original, nn.Parameter)
            memo[id(original)] = tensor if given else nn.Parameter(tensor, requires_grad=False)
        self.module = bare_copy(base, memo)
        self.prepare(base, config, path)

    @classmethod
    def slots(cls, base: nn.Module, config: Any, path: str) -> dict[str, tuple[int, ...]]:
        if isinstance(base, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)):
            raise TypeError(f"modules_to_save cannot be applied to {path!r}: a {type(base).__name__} has no forward")
        return {cls.front + name: tuple(tensor.shape) for name, tensor in own_tensors(base)}

    @classmethod
    def held_dtype(cls, base: nn.Module, suffix: str, autocast: bool) -> torch.dtype:
        return dict(own_tensors(base, cls.front))[suffix].dtype

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: Any) -> None:
        own = dict(own_tensors(base, cls.front))
        for name, tensor in tensors.items():
            tensor.copy_(own[name].detach())

    def train(self, mode: bool = True) -> WholeModule:
        self.__dict__["training"] = mode
        self.module.train(mode)
        return self

    def around(self, x: Any, inner: Forward) -> Any:
        return self.module(x)

    def wrapped(self, inner: Forward) -> Forward:
        return self.module

    def shown(self, base: nn.Module) -> dict[str, torch.Tensor]:
        # Only for parents that read weights instead of calling the layer: `shows` is False.
        return {name: p for name, p in self.module._parameters.items() if p is not None}

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}  # the copy goes on computing while its adapter is merged

    @property
    def changed_names(self) -> tuple[str, ...]:
        return ()

    def named_slots(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from own_tensors(self.module, self.front)

    def attribute_of(self, suffix: str) -> str:
        return f"module.{suffix.removeprefix(self.front)}"

    def conflict(self, other: AdapterLayer) -> str:
        return "both replace it with a copy of their own" if isinstance(other, WholeModule) else ""

    @classmethod
    def memory_name(cls, suffix: str, adapter_name: str) -> str:
        return f"modules_to_save.{adapter_name}.{suffix}"
