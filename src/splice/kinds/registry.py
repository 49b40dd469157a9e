"""The methods that are known: one frozen record each, found by looking through the package."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from splice.base.layers import LayerKind, kind_of
from splice.config import PeftConfig, PeftType
from splice.errors import CheckpointError, UnknownMethodError, UnsupportedLayerError
from splice.kinds.layer import AdapterLayer
from splice.kinds.shared import SharedTensors

if TYPE_CHECKING:
    from splice.methods.prompts.prompt import PromptLayer
    from splice.surgery.tuner import Tuner

_METHODS: dict[PeftType, Method] = {}
_searched: list[str] = []
_PACKAGE = "splice.methods"


def _nothing_to_check(config: Any) -> None:
    return None


def _nothing_to_note(config: Any) -> list[str]:
    return []


class Combining(Enum):
    """How several adapters of a method become one new adapter (`add_weighted_adapter`)."""

    NONE = "they cannot be combined"
    FACTORS = "by their low-rank factors, in one of several ways that the caller chooses"
    SUM = "each tensor is the weighted sum of theirs"


@dataclass(frozen=True)
class Method:
    """What the library has to know about a method.

    Attributes:
        name: the `peft_type` of its checkpoints.
        config: its config class.
        prefix: what the names of its tensors begin with (`lora_`).
        tensor_names: the first components of its tensors' names (`lora_A`).
        layers: the adapter layer for each kind of base layer it supports; empty for prompt learning.
        variant: the adapter layer for a kind of base layer, where a config asks for another one than `layers` has; else None.
        other_layer: the adapter layer for every other base layer, whatever it is; None where it cannot be put on them.
        parameters_layer: the adapter layer for bare parameters of a module; None where it cannot be put on them.
        network_layer: the adapter layer for the network as a whole, of methods that act on its call: prompt learning.
        shared: what holds the tensors that all layers of an adapter use; None where each layer has its own only.
        tuner_methods: what training with it needs, by name: called with the tuner first, found on the model.
        tuner_views: what is read on a model with it, by name: worked out from the tuner.
        loss_term: what a forward in training adds to the loss, given the tuner and an active adapter's name.
        default_targets: modules to target by `config.model_type`, where the config names none.
        find_targets: where the config names none and there is no default: what to target on a network, given its modules.
        default_modules: the same for each further field of the config that names modules.
        follows_ties: whether layers that are tied to adapted input embeddings always share their adapter layer's tensors.
        exclusive: whether only one of its adapters can take effect at a time.
        combining: how several adapters become one.
        outdated_names: first components of tensors' names that only earlier versions wrote, and what to do about them.
        check: raises where a config asks for something that is wrong or not supported, before anything is read.
        loading_notes: a line for each thing that whoever loads an adapter with this config is warned of.
        check_beside: raises where an adapter with the first config cannot stand beside those with the others, by name.
        paper: where the method is described.
    """

    name: PeftType
    config: type[PeftConfig]
    prefix: str
    tensor_names: frozenset[str]
    layers: Mapping[LayerKind, type[AdapterLayer]] = field(default_factory=lambda: MappingProxyType({}))
    variant: Callable[[Any, LayerKind], type[AdapterLayer] | None] | None = None
    other_layer: type[AdapterLayer] | None = None
    parameters_layer: type[AdapterLayer] | None = None
    network_layer: type[PromptLayer] | None = None
    shared: type[SharedTensors] | None = None
    tuner_methods: Mapping[str, Callable[..., Any]] = field(default_factory=lambda: MappingProxyType({}))
    tuner_views: Mapping[str, Callable[[Tuner], Any]] = field(default_factory=lambda: MappingProxyType({}))
    loss_term: Callable[[Tuner, str], torch.Tensor] | None = None
    default_targets: Mapping[str, list[str] | str] = field(default_factory=lambda: MappingProxyType({}))
    find_targets: Callable[[nn.Module, Mapping[str, nn.Module]], str] | None = None
    default_modules: Mapping[str, Mapping[str, list[str]]] = field(default_factory=lambda: MappingProxyType({}))
    follows_ties: bool = False
    exclusive: bool = False
    combining: Combining = Combining.NONE
    outdated_names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    check: Callable[[Any], None] = _nothing_to_check
    loading_notes: Callable[[Any], list[str]] = _nothing_to_note
    check_beside: Callable[[Any, Mapping[str, Any]], None] | None = None
    paper: str = ""

    def layer_for(self, base: nn.Module, path: str, config: PeftConfig) -> type[AdapterLayer]:
        """The adapter layer that an adapter with this config has on `base`.

        Raises:
            UnsupportedLayerError: (a ValueError and a TypeError) this method cannot be put on such a layer.
        """
        kind = kind_of(base)
        if kind is None or kind not in self.layers:
            if self.other_layer is not None:
                return self.other_layer
            supported = ", ".join(k.name.title().replace("_", "") for k in self.layers)
            raise UnsupportedLayerError(
                f"Target module {path!r} is a {type(base).__name__}, which {self.name.value} cannot be put on. "
                f"Supported are: {supported}. Name the layers inside it, or exclude it with `exclude_modules`."
            )
        variant = None if self.variant is None else self.variant(config, kind)
        return self.layers[kind] if variant is None else variant


def register(method: Method) -> Method:
    """Make `method` known.

    Raises:
        KeyError: its name is taken.
    """
    if method.name in _METHODS:
        raise KeyError(f"{method.name.value} is registered already, by {_METHODS[method.name].config.__module__}")
    _METHODS[method.name] = method
    return method


def all_methods() -> Mapping[PeftType, Method]:
    """Every method that is known, in the order of the files' names."""
    if not _searched:
        _searched.append(_PACKAGE)
        for module in pkgutil.walk_packages(importlib.import_module(_PACKAGE).__path__, _PACKAGE + "."):
            importlib.import_module(module.name)
    return MappingProxyType(_METHODS)


def method_named(peft_type: Any, place: str) -> Method:
    """The method of a config's `peft_type`; `place` says where it was read, for the message.

    Raises:
        UnknownMethodError: (a KeyError) there is no such method.
    """
    methods = all_methods()
    if not isinstance(peft_type, str):
        raise CheckpointError(f"{place}: peft_type is {peft_type!r}; it must be a string such as 'LORA'")
    if peft_type in methods:
        return methods[PeftType(peft_type)]
    text = f"{place}: unknown peft_type {peft_type!r}; known are {', '.join(sorted(m.value for m in methods))}."
    if peft_type.upper() in methods:
        text += f" Did you mean {peft_type.upper()!r}?"
    elif peft_type in list(PeftType):
        text += " The method exists, and this version cannot load it yet."
    raise UnknownMethodError(text)


def config_class(name: str) -> type[PeftConfig]:
    """The config class of this name, whichever method it belongs to.

    Raises:
        AttributeError: no method has it.
    """
    for method in all_methods().values():
        if method.config.__name__ == name:
            return method.config
    raise AttributeError(f"module 'splice' has no attribute {name!r}: no method that is known has such a config")
