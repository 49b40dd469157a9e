"""An adapter layer: what one adapter puts on one target. Slots, names, file form and effects are small parts of it.

A method supplies `slots` (which tensors, of which shape), `prepare` (numbers that follow from the config), `initialise` and
its mathematics. Everything else (attaching, selecting, merging, dtypes, devices, dropout, saving) is hosted once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import nn

from splice.config import PeftConfig
from splice.kinds.container import Holder
from splice.kinds.effect import Effect
from splice.kinds.file_form import FileForm
from splice.kinds.names import BIAS, LayerNames, Names
from splice.kinds.slot import Role, Slot
from splice.kinds.weight_effect import WeightEffect


class Registered(NamedTuple):
    """Where a tensor is registered. The place stays while FSDP, `.to` or `load_state_dict` replace the tensor in it."""

    # `_parameters` or `_buffers` of the module that holds it.
    registry: dict[str, Any]
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


class Held:
    """A tensor of an adapter layer by its suffix, looked up where it is registered: `a = Held("lora_A.weight")`."""

    def __init__(self, suffix: str = "") -> None:
        self.suffix = suffix

    def __set_name__(self, owner: type, name: str) -> None:
        self.suffix = self.suffix or name

    @overload
    def __get__(self, layer: None, owner: type) -> Held: ...

    @overload
    def __get__(self, layer: AdapterLayer, owner: type) -> torch.Tensor: ...

    def __get__(self, layer: AdapterLayer | None, owner: type) -> torch.Tensor | Held:
        return self if layer is None else layer.tensor(self.suffix)


class AdapterLayer(Effect, WeightEffect):
    """Tensors and mathematics of one adapter on one target.

    It is no module. Its tensors stand in the tree, in containers on the adapted layer, and it reads them there: whoever
    exchanges parameters in the tree need not know of it.

    Args:
        base: the target.
        config: the adapter's config.
        path: dotted path of the target in the base model.
        slots: what `slots(base, config, path)` gives.
        tensors: one tensor for every slot, made for this layer alone.
    """

    # How its tensors are called.
    names: Names = LayerNames()
    # What of them a checkpoint holds.
    file_form: ClassVar[FileForm] = FileForm()
    # Own suffix -> suffix of the tensor it is the transpose of, where it shares those of a layer of another class.
    transposes: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # Numbers that scripts read and set on an adapted layer, by the reference's names -> the attribute of this layer.
    numbers: ClassVar[Mapping[str, str]] = MappingProxyType({"scaling": "scale", "r": "r"})
    # Whether it uses tensors that all layers of its adapter share.
    uses_shared: ClassVar[bool] = False
    # The adapter layer that holds these, in a tuple; empty until it is joined.
    shared: tuple[AdapterLayer, ...] = ()
    # The path of the layer of the same adapter whose tensors this one shares, where two base layers are tied.
    leader: str = ""
    # The config it was made from, where that is not the adapter's.
    own_config: PeftConfig | None = None
    # Where its tensors stand in the tree; None until it is attached.
    home: Home | None = None

    def __init__(
        self,
        base: nn.Module,
        config: PeftConfig,
        path: str,
        slots: Mapping[str, Slot],
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        self.base = base
        # By container: the module that will be this adapter's entry there.
        self.entries: dict[str, nn.Module] = {}
        # Tensors that are entries themselves, until they are registered in their containers.
        self.loose: dict[str, Any] = {}
        self.registered: dict[str, Registered] = {}
        for suffix, tensor in tensors.items():
            self.hold(suffix, tensor, slots[suffix])
        if BIAS in self.registered:
            self.shows = True
        self.prepare(base, config, path)

    # -- what a method supplies

    @classmethod
    def slots(cls, base: nn.Module, config: Any, path: str) -> dict[str, Slot]:
        """Every tensor that this adapter has on `base`, by suffix; nothing is allocated.

        Raises:
            ValueError: the config cannot be applied to this layer.
        """
        raise NotImplementedError

    @classmethod
    def companions(cls, base: nn.Module, path: str) -> dict[str, type[AdapterLayer]]:
        """Further layers, by path below `base`, that get an adapter layer of their own wherever `base` gets this one."""
        return {}

    @classmethod
    def resolved(cls, base: nn.Module, config: Any) -> dict[str, Any]:
        """Fields that the config leaves open and this base decides."""
        return {}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: Any) -> None:
        """Fill the empty `tensors` of a new adapter in place, by suffix; those that a checkpoint holds."""
        raise NotImplementedError

    def prepare(self, base: nn.Module, config: Any, path: str) -> None:
        """Work out what does not change between calls."""

    def begin(self) -> None:
        """Bring a new adapter's tensors where they start, if that takes more than `initialise` knows of."""

    # -- its tensors

    @property
    def training(self) -> bool:
        """Whether the layer is being trained."""
        return self.base.training

    def tensor(self, suffix: str) -> torch.Tensor:
        """The tensor as it is now."""
        registry, name, _ = self.registered[suffix]
        found: torch.Tensor = registry[name]
        return found

    def find(self, suffix: str) -> torch.Tensor | None:
        """The tensor as it is now; None where this layer has none of that name."""
        return self.tensor(suffix) if suffix in self.registered else None

    def keep(self, suffix: str, tensor: torch.Tensor) -> None:
        """Have, as a buffer that no checkpoint holds, what the layer worked out itself; again in the place of the old."""
        known = self.registered.get(suffix)
        if known is None:
            self.hold(suffix, tensor, Slot(tuple(tensor.shape), Role.BUFFER, stored=False))
        else:
            known.registry[known.name] = tensor

    @property
    def trained_bias(self) -> torch.Tensor | None:
        """The bias that the adapter trains in the place of the base's own."""
        return self.find(BIAS)

    def named_slots(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that a checkpoint holds, in the form it has in memory, by suffix."""
        for suffix, (registry, name, slot) in self.registered.items():
            if slot.stored:
                yield suffix, registry[name]

    def tensors_by_role(self, role: Role) -> Iterator[Registered]:
        """Where the tensors of one role are registered."""
        return (item for item in self.registered.values() if item.slot.role is role)

    def set_trained(self, trained: bool) -> None:
        """Whether the tensors of this layer are trained."""
        for registry, name, _ in self.tensors_by_role(Role.TRAINED):
            if registry[name].is_leaf:  # under FSDP there are others
                registry[name].requires_grad = trained

    def hold(self, suffix: str, tensor: torch.Tensor, slot: Slot) -> None:
        """Take a tensor into the slot: the very parameter where it is one, which then is shared."""
        container, leaf = self.names.place(suffix)
        if leaf:
            *parents, name = leaf.split(".")
            holder = self.entries.get(container)
            if holder is None:
                holder = self.entries[container] = self.new_entry(container)
            for parent in parents:
                below = holder._modules.get(parent)
                if below is None:
                    below = holder._modules[parent] = Holder()
                holder = below
            registry: dict[str, Any] = holder._buffers if slot.role is Role.BUFFER else holder._parameters
            if slot.role is Role.BUFFER and not slot.stored:
                holder._non_persistent_buffers_set.add(name)
        else:
            registry, name = self.loose, container
        if slot.role is not Role.BUFFER and type(tensor) is not nn.Parameter:
            tensor = nn.Parameter(tensor, requires_grad=False)
        registry[name] = tensor
        self.registered[suffix] = Registered(registry, name, slot)

    def new_entry(self, container: str) -> nn.Module:
        """The module for tensors whose names go on behind the container."""
        return Holder()

    def leave_empty(self) -> None:
        """Have no values, on the meta device, until they are loaded."""
        for registry, name, _ in self.registered.values():
            tensor = registry[name]
            empty = tensor.detach().to(torch.device("meta"))
            is_parameter = isinstance(tensor, nn.Parameter)
            registry[name] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty

    def join(self, shared: AdapterLayer) -> None:
        """Take what all layers of this adapter share; called once, of methods whose record has `shared`."""
        if self.uses_shared:
            self.shared = (shared,)

    def shown(self, base: nn.Module) -> dict[str, torch.Tensor]:
        bias = self.trained_bias
        return {} if bias is None else {"bias": bias}
