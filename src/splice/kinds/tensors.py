"""The tensors of an adapter layer: where each of them stands in the tree of modules, and how the layer reads them there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeAlias, overload

import torch
from torch import nn

from splice.kinds.container import Holder
from splice.kinds.names import LayerNames, Names
from splice.kinds.slot import Role, Slot

# `_parameters` or `_buffers` of a module, or a dict of our own until there is one. torch gives the two different types,
# and a dict that is written to can be of one alone.
Registry: TypeAlias = dict[str, Any]


class Registered(NamedTuple):
    """Where a tensor is registered. The place stays while FSDP, `.to` or `load_state_dict` replace the tensor in it."""

    # Of the module that holds it.
    registry: Registry
    # Its name there.
    name: str
    # What it is.
    slot: Slot


class Home(NamedTuple):
    """Where the containers of an adapter layer stand."""

    # `_modules` of the adapted layer, or of what stands for the network as a whole.
    modules: dict[str, nn.Module | None]
    # Those of them that adapters put there.
    added: dict[str, nn.Module]
    # The layer, or the network.
    layer: nn.Module
    # Whether some of its tensors are in none of its entries: they are entries themselves, or parameters of the base layer.
    has_bare: bool = False


class Held:
    """A tensor of an adapter layer by its suffix, looked up where it is registered: `a = Held("lora_A.weight")`."""

    # Not the tensor itself as an attribute: FSDP, `.to` and `load_state_dict` put others in its place, and tell nobody.

    def __init__(self, suffix: str = "") -> None:
        self.suffix = suffix

    def __set_name__(self, owner: type, name: str) -> None:
        self.suffix = self.suffix or name

    @overload
    def __get__(self, layer: None, owner: type) -> Held: ...

    @overload
    def __get__(self, layer: OwnTensors, owner: type) -> torch.Tensor: ...

    def __get__(self, layer: OwnTensors | None, owner: type) -> torch.Tensor | Held:
        return self if layer is None else layer.tensor(self.suffix)


class OwnTensors:
    """The part of an adapter layer that has its tensors.

    It is no module: they stand in containers on the adapted layer, and it reads them there. So whoever exchanges
    parameters in the tree need not know of it.
    """

    # Whether it is for layers whose tensors tensor parallelism divides: its own tensors are divided then, as `template` says.
    divides: ClassVar[bool] = False
    # Own suffix -> suffix of the tensor it is the transpose of, where it shares those of a layer of another class.
    transposes: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # How they are called.
    names: Names = LayerNames()
    # Where they stand in the tree; None until the layer is attached.
    home: Home | None = None
    # By container: the module that will be this adapter's entry there.
    entries: dict[str, nn.Module]
    # Tensors that are entries themselves, until they are registered in their containers.
    loose: Registry
    # Suffix -> where the tensor is.
    registered: dict[str, Registered]

    def __init__(self, slots: Mapping[str, Slot], tensors: Mapping[str, torch.Tensor]) -> None:
        self.entries, self.loose, self.registered = {}, {}, {}
        for suffix, tensor in tensors.items():
            self.hold(suffix, tensor, slots[suffix])

    @classmethod
    def template(cls, base: nn.Module, suffix: str, slot: Slot) -> torch.Tensor:
        """A tensor without values that is divided among processes as that of the slot is; asked where it `divides`."""
        raise NotImplementedError

    def tensor(self, suffix: str) -> torch.Tensor:
        """The tensor as it is now."""
        registry, name, _ = self.registered[suffix]
        found: torch.Tensor = registry[name]
        return found

    def find(self, suffix: str) -> torch.Tensor | None:
        """The tensor as it is now; None where this layer has none of that name."""
        return self.tensor(suffix) if suffix in self.registered else None

    def keep(self, suffix: str, tensor: torch.Tensor) -> None:
        """Have this tensor in the place of the one of that suffix. Where there is none it becomes a buffer, not stored."""
        known = self.registered.get(suffix)
        if known is None:
            self.hold(suffix, tensor, Slot(tuple(tensor.shape), Role.BUFFER, stored=False))
        else:
            known.registry[known.name] = tensor

    def named_slots(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that a checkpoint holds, in the form it has in memory, by suffix."""
        for suffix, (registry, name, slot) in self.registered.items():
            if slot.stored:
                yield suffix, registry[name]

    def tensors_by_role(self, role: Role) -> Iterator[Registered]:
        """Where the tensors of one role are registered."""
        return (item for item in self.registered.values() if item.slot.role is role)

    def holders(self) -> Iterator[nn.Module]:
        """The modules that the tensors stand in, once they are attached."""
        for entry in self.entries.values():
            yield from entry.modules()
        if self.home is not None:
            for module in self.home.added.values():
                if any(module._parameters is item.registry for item in self.registered.values()):
                    yield module

    def set_trained(self, trained: bool) -> None:
        """Whether the tensors of this layer are trained."""
        for registry, name, _ in self.tensors_by_role(Role.TRAINED):
            if registry[name].is_leaf:  # under FSDP there are others
                registry[name].requires_grad = trained

    def hold(self, suffix: str, tensor: torch.Tensor, slot: Slot) -> None:
        """Take a tensor into the slot: the very parameter where it is one, which then is shared."""
        nameless = self.names.nameless(suffix) is not None
        container, leaf = (suffix, "") if nameless else self.names.place(suffix)
        if leaf:
            parents, _, name = leaf.rpartition(".")
            holder = self.entries.get(container)
            if holder is None:
                holder = self.entries[container] = self.new_entry(container)
            for parent in parents.split(".") if parents else ():
                below = holder._modules.get(parent)
                if below is None:
                    below = holder._modules[parent] = Holder()
                holder = below
            # Not `register_buffer` and `register_parameter`: their checks of every name are most of what a load would cost.
            registry: Registry = holder._buffers if slot.role is Role.BUFFER else holder._parameters
            if slot.role is Role.BUFFER and not slot.persistent:
                holder._non_persistent_buffers_set.add(name)
        else:
            registry, name = self.loose, container
        if slot.role is not Role.BUFFER and type(tensor) is not nn.Parameter:
            tensor = _frozen_parameter(tensor)
        registry[name] = tensor
        self.registered[suffix] = Registered(registry, name, slot)

    def new_entry(self, container: str) -> nn.Module:
        """The module for tensors whose names go on behind the container."""
        return Holder()

    def leave_empty(self) -> None:
        """Have no values, on the meta device, until they are loaded; what no checkpoint holds keeps its own."""
        for registry, name, slot in self.registered.values():
            if not slot.stored:
                continue
            tensor = registry[name]
            empty = tensor.detach().to(torch.device("meta"))
            is_parameter = isinstance(tensor, nn.Parameter)
            registry[name] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty


def gets_gradients(layer: OwnTensors) -> bool:
    """Whether what is computed with the tensors of `layer` now may give them gradients."""
    return torch.is_grad_enabled() and any(
        registry[name].requires_grad for registry, name, _ in layer.registered.values()
    )


def _frozen_parameter(tensor: torch.Tensor) -> nn.Parameter:
    # What `nn.Parameter` comes to as well for a plain tensor, after it has asked twice as long.
    if type(tensor) is torch.Tensor:
        return torch.Tensor._make_subclass(nn.Parameter, tensor, False)
    return nn.Parameter(tensor, requires_grad=False)
