"""A base model as it is without adapters: its modules, their tensors and classes, whatever is on them now."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from typing import Protocol, cast

import torch
from torch import nn

from splice.base.foreign_models import forward_places, is_hooked
from splice.base.offload import KEPT

# Under which attributes an adapted layer, a parent whose fused path is switched off, and a network with adapters keep what
# they carry.
HOST = "splice_host"
GUARD = "splice_guard"
TUNER = "splice_tuner"


class Carried(Protocol):
    """What an adapted layer or a guarded parent carries, as far as a walk asks for it."""

    # Protocols, since hosts and guards are classes of higher rooms, and this room imports none of these.

    @property
    def original(self) -> type[nn.Module]:
        """The class that the module had before."""
        ...


class CarriedHost(Carried, Protocol):
    """What an adapted layer carries, as far as a copy asks for it."""

    @property
    def added(self) -> Container[str]:
        """Names of the modules below it that are not its own."""
        ...

    @property
    def held(self) -> Container[str]:
        """Names of its parameters that are not its own."""
        ...

    @property
    def own_forward(self) -> Callable[..., object] | None:
        """The forward that stood on the object itself before it was adapted, where one did."""
        ...


class NetworkOf:
    """The network that a layer is in: not kept alive, and not dragged into a copy of the layer alone."""

    def __init__(self, network: nn.Module | None) -> None:
        self._found = None if network is None else weakref.ref(network)

    def get(self) -> nn.Module | None:
        """The network; None where it is not known, as of a layer that was pickled or copied by itself."""
        return None if self._found is None else self._found()

    def __deepcopy__(self, memo: dict[int, object]) -> NetworkOf:
        # A network that is being copied is in `memo` before its layers are.
        return NetworkOf(cast("nn.Module | None", memo.get(id(self.get()))))

    def __reduce__(self) -> tuple[type[NetworkOf], tuple[None]]:
        return NetworkOf, (None,)


def carried(module: nn.Module, mark: str) -> object | None:
    """What splice has put on `module` under `mark`; None where nothing is.

    Callers that know more of it than `Carried` cast the answer to their class.
    """
    # In the object's dict, not among its attributes: torch would look a missing one up in three registries, and raise.
    # `isinstance` would not do: an interrupted attach leaves the mark without the class, and guards swap no class.
    return module.__dict__.get(mark)


def own_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of `module` and below, without what adapters added: its `state_dict`, live."""
    for name, parameter in bare_parameters(module):
        if parameter is not None:
            yield prefix + name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in bare_children(module):
        yield from own_tensors(child, f"{prefix}{name}.")


def bare_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter | None]]:
    """The parameters of `module` itself, without those that adapters added."""
    host = cast("CarriedHost | None", carried(module, HOST))
    held = () if host is None else host.held
    return ((name, parameter) for name, parameter in module._parameters.items() if name not in held)


def bare_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of `module` that were there before any adapter."""
    # Only of an adapted layer are names ours. A base may have a child of the same name, and that is the base's.
    host = cast("CarriedHost | None", carried(module, HOST))
    added = () if host is None else host.added
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
        for name, child in bare_children(module):
            walk(child, f"{path}.{name}" if path else name)

    # Not `network.named_modules()` with the adapters' modules taken out again: that walks all of them first.
    walk(network, "")
    return found


def bare_copy(module: nn.Module, memo: dict[int, object]) -> nn.Module:
    """A deep copy of `module` as it is without adapters and without hooks, which stay on the original."""
    # Not `copy.deepcopy(module)` with the adapters taken out again: it would copy every one of them first.
    cls = original_class(module)
    clone = empty_instance(cls)
    hooks = (HOST, GUARD, KEPT, "_hf_hook", "_old_forward", "_diffusers_hook", "forward")
    state = {k: v for k, v in module.__dict__.items() if k not in hooks}
    host, standing = cast("CarriedHost | None", carried(module, HOST)), forward_places(module)
    patched = (standing[-1].forward if standing else None) if host is None else host.own_forward
    if patched is not None and not is_hooked(module):  # else it belongs to the hook
        state["forward"] = patched
    state["_modules"], state["_parameters"] = dict(bare_children(module)), dict(bare_parameters(module))
    state.update({name: OrderedDict() for name in state if name.endswith(("_hooks", "_hooks_with_kwargs"))})
    memo[id(module)] = clone  # a forward that was set on the object is then the clone's own
    clone.__dict__.update(copy.deepcopy(state, memo))
    return clone


def without_adapters(layer: nn.Module) -> nn.Module:
    """`layer` as its own class knows it: the same tensors, in an object whose registries may be changed."""
    bare = empty_instance(original_class(layer))
    state = {name: value for name, value in vars(layer).items() if name not in (HOST, GUARD, "forward")}
    state["_parameters"], state["_buffers"] = dict(bare_parameters(layer)), dict(state["_buffers"])
    state["_modules"] = dict(bare_children(layer))
    vars(bare).update(state)
    return bare


def empty_instance(cls: type[nn.Module]) -> nn.Module:
    """An object of this class without anything in it, for a copy to fill."""
    # Not `cls.__new__`, which may want what the original was made from; all that it left on that is copied.
    return object.__new__(cls)


def original_class(layer: nn.Module) -> type[nn.Module]:
    """The class that `layer` has without adapters."""
    # Attention may carry both marks. Either knows the class without the other's, whichever came first.
    for mark in (HOST, GUARD):
        found = cast("Carried | None", carried(layer, mark))
        if found is not None:
            return found.original
    return type(layer)
