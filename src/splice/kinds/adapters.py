"""What a method may ask of the adapters on a network. The rooms above hand their tuner in; a method knows no more of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar, cast

import torch
from torch import nn

from splice.base.bare import TUNER, carried
from splice.config import PeftConfig
from splice.discovery import find_facade
from splice.selection import Selection

T = TypeVar("T")


class Adapters(Protocol):
    """The adapters of one network."""

    @property
    def model(self) -> nn.Module:
        """The network."""
        ...

    @property
    def training(self) -> bool:
        """Whether the network is being trained."""
        ...

    @property
    def peft_config(self) -> Mapping[str, PeftConfig]:
        """The configs, by adapter name, in the order they were added."""
        ...

    @property
    def placed(self) -> Mapping[str, Mapping[str, object]]:
        """For each adapter its adapter layers, by path; "" is the path of the network itself."""
        ...

    @property
    def selection(self) -> Selection:
        """Which adapters take effect."""
        ...


class Remakes(Protocol):
    """A model whose adapters can be made anew: a PeftModel."""

    def remake_adapter(self, adapter_name: str, config: PeftConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put an adapter with this config and these tensors, by their keys, in the place of the one of that name.

        Raises:
            ValueError: there is no such adapter, it is merged, or the tensors are not those of the config.
        """
        ...


class Loads(Protocol):
    """A PeftModel, as far as a method that is built of several adapters needs it."""

    @property
    def peft_config(self) -> Mapping[str, PeftConfig]:
        """The configs, by adapter name."""
        ...

    def load_adapter(self, model_id: str, adapter_name: str, **options: object) -> object:
        """Load one more adapter, which does not become active."""
        ...

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig) -> None:
        """Put one more new adapter on the model."""
        ...

    def set_adapter(self, adapter_name: str) -> None:
        """Make this adapter the active one."""
        ...

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off."""
        ...

    def unload(self) -> nn.Module:
        """The network as it was before the first adapter came."""
        ...


class LoadsFirst(Protocol):
    """How a network gets its first adapter: `PeftModel.from_pretrained`."""

    def __call__(self, model: nn.Module, model_id: str, adapter_name: str, **options: object) -> Loads:
        """The PeftModel around `model`, with the adapter active."""
        ...


# Entered by the room that has it.
_LOADS_FIRST: list[LoadsFirst] = []


def register_first_load(function: LoadsFirst) -> None:
    """Let methods that are built of several adapters load these."""
    _LOADS_FIRST.append(function)


def load_first(model: nn.Module, model_id: str, adapter_name: str, **options: object) -> Loads:
    """The PeftModel around `model` with this adapter: `PeftModel.from_pretrained`, for whoever stands below it."""
    find_facade()
    return _LOADS_FIRST[0](model, model_id, adapter_name, **options)


def adapters_on(model: nn.Module) -> Adapters | None:
    """The adapters of a network, or of a PeftModel around it; None where there are none."""
    network = model
    for name in ("base_model", "model"):  # of a PeftModel: what knows the adapters, and the network in that
        if carried(network, TUNER) is None:
            network = network._modules.get(name) or network
    found = cast("tuple[Adapters] | None", carried(network, TUNER))
    return None if found is None else found[0]


def names_or_active(adapters: Adapters, names: str | Iterable[str] | None) -> list[str]:
    """The adapters that somebody names, one or several; the active ones, if None."""
    if names is None:
        return list(adapters.selection.active)
    return [names] if isinstance(names, str) else list(names)


def layers_of(adapters: Adapters, names: Iterable[str], kind: type[T]) -> dict[str, T]:
    """The layers of one class that these adapters have, by path; adapters that are not there have none."""
    found = (item for name in names for item in adapters.placed.get(name, {}).items())
    return {path: layer for path, layer in found if isinstance(layer, kind)}
