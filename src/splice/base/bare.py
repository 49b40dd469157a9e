"""A base model as it is without adapters: its modules, their tensors and classes, whatever is on them now."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Container, Iterator
from typing import Any, Protocol

import torch
from torch import nn

# Under which attributes an adapted layer, and a parent that is guarded because it reads weights, keep what they carry.
HOST = "splice_host"
GUARD = "splice_guard"


class Carried(Protocol):
    """What a walk asks of that which a layer carries."""

    @property
    def original(self) -> type[nn.Module]:
        """The class that the layer had before."""
        ...

    @property
    def added(self) -> Container[str]:
        """Names of the modules below it that are not its own."""
        ...


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
    carried: Carried | None = module.__dict__.get(HOST)
    added = () if carried is None else carried.added
    for name, child in module._modules.items():
        if child is not None and name not in added:
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
        for name, child in bare_children(module) if HOST in module.__dict__ else module._modules.items():
            if child is not None:
                walk(child, f"{path}.{name}" if path else name)

    walk(network, "")
    return found


def bare_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of `module` as it is without adapters and without hooks, which stay on the original."""
    cls = original_class(module)
    clone = cls.__new__(cls)
    state = {k: v for k, v in module.__dict__.items() if k not in (HOST, GUARD, "_hf_hook", "_old_forward", "forward")}
    patched = module.__dict__.get("forward")
    if HOST in module.__dict__:
        patched = module.__dict__[HOST].own_forward
    if patched is not None and "_hf_hook" not in module.__dict__:
        state["forward"] = patched
    state["_modules"] = dict(bare_children(module))
    state.update({name: OrderedDict() for name in state if name.endswith(("_hooks", "_hooks_with_kwargs"))})
    memo[id(module)] = clone  # a forward that was set on the object is then the clone's own
    clone.__dict__.update(copy.deepcopy(state, memo))
    return clone


def original_class(layer: nn.Module) -> type[nn.Module]:
    """The class that `layer` has without adapters."""
    for mark in (HOST, GUARD):
        carried: Carried | None = layer.__dict__.get(mark)
        if carried is not None:
            return carried.original
    return type(layer)
