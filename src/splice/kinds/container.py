"""Where the tensors of adapters stand in the tree of modules: a container for each name, with an entry for each adapter.

`layer.lora_A["default"].weight`, `layer.ia3_l["default"]`. Containers hold and compute nothing, so what exchanges parameters
in the tree (`.to`, FSDP, `load_state_dict`) exchanges those that the adapter layers compute with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from splice.kinds.light_module import LightModule

# What an adapter has of one name: a module with its tensors, or the tensor itself where the name ends there.
Entry: TypeAlias = nn.Module | torch.Tensor


class Owner(Protocol):
    """What is told that a module below it was hooked: the host of the layer."""

    hooked: bool


class Tie(NamedTuple):
    """One of the places of a parameter that several adapter layers share."""

    # `_parameters` of the module there.
    registry: dict[str, Any]
    # Its name there.
    name: str
    # Whether it is the transpose there of what the first of the layers has.
    transposed: bool


class _Hookable(LightModule):
    """A module that nobody calls while nobody hooks it: the tensors in it are read where they stand.

    FSDP gathers tensors, and accelerate brings them from where they are offloaded, by hooks on the module that has them. So
    the first hook is told to the layer's host, which from then on calls the module around whatever computes with it.
    """

    # The host; None until the module stands in the tree.
    owner: Owner | None = None
    # By the name of a parameter here all its places, this one among them: transformers' loader puts others in the place of
    # those of one layer alone. One list for all of them.
    ties: Mapping[str, list[Tie]] = {}

    def forward(self, run: Callable[[], Any]) -> Any:
        """Do what is computed with the tensors, with the hooks around it."""
        return run()

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self._tell()
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self._tell()
        return super().register_forward_hook(*args, **kwargs)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "forward":  # accelerate puts its own in place
            self._tell()
        super().__setattr__(name, value)
        self._share(name, value)

    def _share(self, name: str, value: object) -> None:
        if isinstance(value, nn.Parameter):
            places = self.ties.get(name, ())
            here = [place.transposed for place in places if place.registry is self._parameters and place.name == name]
            for registry, key, transposed in places:
                turned = transposed != here[0]
                shared = nn.Parameter(value.detach().T, requires_grad=value.requires_grad) if turned else value
                registry[key] = shared

    def _tell(self) -> None:
        if self.owner is not None:
            self.owner.hooked = True


class Holder(_Hookable):
    """Tensors of one adapter, below their container; nested holders make dotted names.

    `bias` exists as None until it is held, so that code may ask for it as of any linear layer.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self._parameters["bias"] = None

    def train(self, mode: bool = True) -> Holder:
        self.__dict__["training"] = mode  # nothing below has a mode
        return self

    def link(self, layer: object) -> None:
        """Be told of the adapter layer that this is an entry of; of None when it leaves the tree.

        For those that compute with it. Each would keep the other in memory.
        """


class Several(Holder):
    """Where the reference has a list or a dict: `layer.peanut_encoders["default"][0]`, `layer.osf_svd_params["default"]`."""

    def __getitem__(self, key: int | str) -> Entry:
        found: Entry | None = self._modules.get(str(key))
        if found is None:
            found = self._parameters.get(str(key))
        if found is None:
            raise IndexError(key) if isinstance(key, int) else KeyError(key)
        return found

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> list[str]:
        return [*self._modules, *(name for name, p in self._parameters.items() if p is not None)]


class Container(_Hookable):
    """Everything of one name on one layer, by adapter name.

    Any string is a name here (`nn.ModuleDict` refuses dots and the names of its own methods). The train/eval mode is
    passed on only when it changes, and only to modules that have one: `model.eval()` costs the same for one adapter and for
    a thousand.
    """

    def __getitem__(self, name: str) -> Entry:
        for registry in (self._modules, self._parameters, self._buffers):
            entry = registry.get(name)
            if entry is not None:
                return entry
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._parameters or name in self._buffers

    def __iter__(self) -> Iterator[str]:
        yield from (*self._modules, *self._parameters, *self._buffers)

    def __len__(self) -> int:
        return len(self._modules) + len(self._parameters) + len(self._buffers)

    def keys(self) -> list[str]:
        return list(self)

    def values(self) -> list[Entry]:
        return [self[name] for name in self]

    def items(self) -> list[tuple[str, Entry]]:
        return [(name, self[name]) for name in self]

    def drop(self, name: str) -> bool:
        """Forget the adapter of this name, if it has an entry; whether there are entries of others."""
        modules = self._modules
        if modules.pop(name, None) is not None and modules:
            return True  # as on nearly all layers: where entries are modules, no tensor has the name of one
        for registry in (self._parameters, self._buffers):
            registry.pop(name, None)
        self._non_persistent_buffers_set.discard(name)
        if name in self.ties:
            del self.__dict__["ties"][name]
        return len(self) > 0

    def train(self, mode: bool = True) -> Container:
        if mode is not self.training:
            self.__dict__["training"] = mode
            for module in self._modules.values():
                if module is not None and type(module) is not Holder:
                    module.train(mode)
        return self

    def __getattr__(self, name: str) -> Entry:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Names of adapters may have dots, and paths are split at each: one step leads to what begins with it.
            if not name.startswith("__") and any(entry.startswith(f"{name}.") for entry in self):
                return _Below(self, f"{name}.")
            raise

    def __setattr__(self, name: str, value: object) -> None:
        if value is None or isinstance(value, torch.Tensor):
            for registry in (self._parameters, self._buffers):  # with dots in their names too, which torch refuses
                if name in registry:
                    registry[name] = value  # type: ignore[assignment]
                    self._share(name, value)
                    return
        super().__setattr__(name, value)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, torch.Tensor],
        prefix: str,
        local_metadata: Mapping[str, object],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # torch takes what stands before the first dot for a child's name, and an adapter's name may have dots itself.
        found: list[str] = []
        super()._load_from_state_dict(dict(state_dict), prefix, local_metadata, strict, missing_keys, found, error_msgs)
        known = tuple(f"{prefix}{name}" for name in self)
        unexpected_keys.extend(key for key in found if not key.startswith(known))


class _Below(LightModule):
    """The entries of a container whose names begin with some components, on the way to one of them."""

    def __init__(self, container: Container, front: str) -> None:
        super().__init__()
        self.__dict__.update(_container=container, _front=front)
        skip = len(front)
        self._parameters.update({n[skip:]: p for n, p in container._parameters.items() if n.startswith(front)})
        self._modules.update({n[skip:]: m for n, m in container._modules.items() if n.startswith(front)})

    def __getattr__(self, name: str) -> Entry:
        container, full = self.__dict__["_container"], self.__dict__["_front"] + name
        found: Entry = container[full] if full in container else getattr(container, full)
        return found
