"""What an adapter keeps as a whole: copies of modules (`modules_to_save`) and trained biases."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from splice.base.layers import ADAPTERS
from splice.config import PeftConfig
from splice.kinds.layer import AdapterLayer, Forward, LightModule


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


class BiasOnly(AdapterLayer):
    """A trained bias on a module that is no target otherwise (`bias="all"`)."""

    base_infix = ""
    mergeable = True

    @classmethod
    def slots(cls, base: nn.Module, config: Any, path: str) -> dict[str, tuple[int, ...]]:
        bias = base._parameters["bias"]
        assert bias is not None
        return {"bias": tuple(bias.shape)}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: Any) -> None:
        copy_bias(tensors["bias"], base)

    def wrapped(self, inner: Forward) -> Forward:
        return inner  # the host calls it with the trained bias in place

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}

    @property
    def changed_names(self) -> tuple[str, ...]:
        return ()

    def named_slots(self) -> Iterator[tuple[str, torch.Tensor]]:
        assert self.trained_bias is not None
        yield "bias", self.trained_bias

    def attribute_of(self, suffix: str) -> str:
        return "trained_bias"

    @classmethod
    def memory_name(cls, suffix: str, adapter_name: str) -> str:
        return suffix


def copy_bias(tensor: torch.Tensor, base: nn.Module) -> None:
    """Start a trained bias from the base's own."""
    bias = base._parameters["bias"]
    assert bias is not None
    tensor.copy_(bias.detach())


def own_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of `module` and below, without what adapters added: its `state_dict`, live."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in bare_children(module):
        yield from own_tensors(child, f"{prefix}{name}.")


def bare_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of `module` that were there before any adapter."""
    adapted = "splice_host" in module.__dict__
    for name, child in module._modules.items():
        if child is not None and not (adapted and name == ADAPTERS):
            yield name, child


def walk_bare(network: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base model by path, each once; what adapters added is not entered.

    So the cost does not depend on how many adapters there are.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found[path] = module
        skip = ADAPTERS if "splice_host" in module.__dict__ else None
        for name, child in module._modules.items():
            if child is not None and name != skip:
                walk(child, f"{path}.{name}" if path else name)

    walk(network, "")
    return found


def bare_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of `module` as it is without adapters and without hooks, which stay on the original."""
    from splice.surgery.adapted import original_class

    cls = original_class(module)
    clone = cls.__new__(cls)
    state = {
        k: v for k, v in module.__dict__.items() if k not in ("splice_host", "_hf_hook", "_old_forward", "forward")
    }
    patched = module.__dict__.get("forward")
    if "splice_host" in module.__dict__:
        patched = module.__dict__["splice_host"].own_forward
    if patched is not None and "_hf_hook" not in module.__dict__:
        state["forward"] = patched
    state["_modules"] = dict(bare_children(module))
    state.update({name: OrderedDict() for name in state if name.endswith(("_hooks", "_hooks_with_kwargs"))})
    memo[id(module)] = clone  # a forward that was set on the object is then the clone's own
    clone.__dict__.update(copy.deepcopy(state, memo))
    return clone
