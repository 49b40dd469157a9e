"""The methods that are known: one frozen record each, found by looking through the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from splice.base.layers import LayerKind, kind_of
from splice.base.sharding import is_tensor_parallel
from splice.checkpoint.types import PeftType
from splice.config import PeftConfig, class_of
from splice.discovery import find_methods
from splice.errors import UnsupportedLayerError
from splice.kinds.adapters import Adapters
from splice.kinds.approximation import Approximation
from splice.kinds.combining import Combine
from splice.kinds.layer import AdapterLayer, Config
from splice.kinds.network import NetworkLayer
from splice.kinds.reading import Reader
from splice.kinds.shared import SharedTensors
from splice.kinds.swapping import Swapping

_METHODS: dict[PeftType, Method] = {}
# What a model with adapters of whatever method can be asked, by name; a method that others are turned into answers it.
_QUESTIONS: dict[str, Callable[..., object]] = {}


def _nothing_to_check(config: PeftConfig) -> None:
    return None


def _as_it_is(config: PeftConfig, network: nn.Module, modules: Mapping[str, nn.Module]) -> PeftConfig:
    return config


def _nothing_to_note(config: PeftConfig) -> list[str]:
    return []


class UnchangedBase(Protocol):
    """How an adapter whose initialisation took something out of the base becomes one for the base as it was."""

    def __call__(
        self, config: Config, tensors: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor], place: str
    ) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
        """Its config and its tensors.

        Args:
            config: of the adapter as it is.
            tensors: of the adapter as it is, by their keys.
            before: those right after its initialisation.
            place: where these lie, for messages.

        Raises:
            ValueError: `before` belongs to another adapter, or the config cannot be written for the unchanged base.
        """
        ...


class Experts(NamedTuple):
    """Adapters of another method that those of this one stand on; they are loaded first."""

    # Their method.
    of: PeftType
    # Their names on the model -> folders or Hub ids, by the config and the options of the load; it may complete the config.
    places: Callable[[Config, Mapping[str, Any]], Mapping[str, str]]


class Beside(NamedTuple):
    """Which adapters of a method can stand beside one another."""

    # Whether an adapter with this config has a say in that.
    concerns: Callable[[Config], bool]
    # Raises where an adapter with the first config cannot stand beside others, by name: all of its method where it has a say
    # itself, else those that have one.
    check: Callable[[Config, Mapping[str, PeftConfig]], None]


class Method(NamedTuple):
    """What the library has to know about a method.

    Attributes:
        name: the `peft_type` of its checkpoints.
        config: its config class.
        prefix: what the names of its tensors begin with (`lora_`).
        tensor_names: the first components of its tensors' names (`lora_A`).
        layers: the adapter layer for each kind of base layer it supports; empty for prompt learning.
        variant: the adapter layer for a kind of base layer (for this one, if it is given), where a config asks for another
            one than `layers` has; else None.
        other_layer: the adapter layer for every other base layer, whatever it is; None where it cannot be put on them.
        divided_layers: the adapter layer in the place of another one where tensor parallelism divides the base layer.
        parameters_layer: the adapter layer for bare parameters of a module; None where it cannot be put on them.
        network_layer: the adapter layer for the network as a whole, of methods that act on its call; some are on layers too.
        experts: adapters of another method that its own stand on; None for none.
        shared: what holds the tensors that all layers of an adapter use; None where each layer has its own only.
        groups: which tensors its layers share with one before them, given the targets in their order: path -> suffix -> path
            of the layer that has it; None where no layer shares with another.
        tuner_methods: what training with it needs, by name: called with the adapters first, found on the model.
        tuner_views: what is read on a model with it, by name: worked out from the adapters.
        containers: tensors for which every layer with such an adapter has a place, also an empty one, by the first components
            of their names, in the reference's order.
        layer_views: what is read on a layer with it, by name: worked out from the adapter layer; None for no entry.
        layer_methods: what can be called on a layer with it, by name: called with what the layer carries first.
        call_arguments: arguments of a call of the model that are meant for its adapters.
        loss_term: what a forward in training adds to the loss, given the adapters and an active adapter's name.
        default_targets: modules to target by `config.model_type`, where the config names none.
        find_targets: finds targets on a network, given its modules, where the config names none and there is no default.
        passes_over: whether targets that it cannot be put on are left out, as long as there are others.
        default_modules: further fields of the config that name modules -> their defaults, by `config.model_type` too.
        follows_ties: whether layers that are tied to adapted input embeddings always share their adapter layer's tensors.
        exclusive: whether only one of its adapters can take effect at a time.
        combine: how several adapters become one (`add_weighted_adapter`); None where they cannot.
        approximation: how it takes the place of an adapter of another method; None where it cannot.
        swapping: how one adapter takes the place of another in a compiled model; None where that is not possible.
        readings: ways in which its adapters were written before, asked in turn where a checkpoint does not fit as it is.
        restated: a config for an earlier form of this network, put in words of the network as it is; mostly unchanged.
        joins: suffix of a tensor -> how the tensors that layers had, which are parts of one parameter now, become that of the
            parameter; for the suffixes of all its tensors, or none. Given the config, the path of the experts, and for each
            part the tensors of all experts in their order.
        for_unchanged_base: how an adapter is written for the base before its initialisation changed that; None where none
            of its initialisations does.
        tags: what the model card of such an adapter is tagged with.
        outdated_names: first components of tensors' names that only earlier versions wrote, and what to do about them.
        check: raises where a config asks for something that is wrong or not supported, before anything is read.
        loading_notes: a line for each thing that whoever loads an adapter with this config is warned of.
        check_beside: which of its adapters can stand beside one another, where not all can.
        names: what else programs import of it, by the reference's names; an adapter layer stands for the adapted layers that
            carry it.
        paper: where the method is described.
        summary: what the method does, in one sentence for readers who do not know it.
    """

    name: PeftType
    config: type[PeftConfig]
    prefix: str
    tensor_names: frozenset[str]
    layers: Mapping[LayerKind, type[AdapterLayer]] = MappingProxyType({})
    variant: Callable[[Config, LayerKind, nn.Module | None], type[AdapterLayer] | None] | None = None
    other_layer: type[AdapterLayer] | None = None
    divided_layers: Mapping[type[AdapterLayer], type[AdapterLayer]] = MappingProxyType({})
    parameters_layer: type[AdapterLayer] | None = None
    network_layer: type[NetworkLayer] | None = None
    experts: Experts | None = None
    shared: type[SharedTensors] | None = None
    groups: Callable[[Sequence[tuple[str, nn.Module]], Config], Mapping[str, Mapping[str, str]]] | None = None
    tuner_methods: Mapping[str, Callable[..., object]] = MappingProxyType({})
    tuner_views: Mapping[str, Callable[[Adapters], object]] = MappingProxyType({})
    containers: tuple[str, ...] = ()
    layer_views: Mapping[str, Callable[[Any], object]] = MappingProxyType({})
    layer_methods: Mapping[str, Callable[..., object]] = MappingProxyType({})
    call_arguments: frozenset[str] = frozenset()
    loss_term: Callable[[Adapters, str], torch.Tensor] | None = None
    default_targets: Mapping[str, list[str] | str] = MappingProxyType({})
    find_targets: Callable[[nn.Module, Mapping[str, nn.Module]], str | set[str]] | None = None
    passes_over: bool = False
    default_modules: Mapping[str, Mapping[str, list[str]]] = MappingProxyType({})
    follows_ties: bool = False
    exclusive: bool = False
    combine: Combine | None = None
    approximation: Approximation | None = None
    swapping: Swapping | None = None
    readings: tuple[Reader, ...] = ()
    restated: Callable[[Config, nn.Module, Mapping[str, nn.Module]], PeftConfig] = _as_it_is
    joins: Mapping[str, Callable[[Config, str, Mapping[str, Sequence[torch.Tensor]]], torch.Tensor]] = MappingProxyType(
        {}
    )
    for_unchanged_base: UnchangedBase | None = None
    tags: tuple[str, ...] = ()
    outdated_names: Mapping[str, str] = MappingProxyType({})
    check: Callable[[Config], None] = _nothing_to_check
    loading_notes: Callable[[Config], list[str]] = _nothing_to_note
    check_beside: Beside | None = None
    names: Mapping[str, object] = MappingProxyType({})
    paper: str = ""
    summary: str = ""

    @property
    def on_layers(self) -> bool:
        """Whether its adapters are on layers, be it beside what they put on the call of the network."""
        return bool(self.layers) or self.other_layer is not None or self.network_layer is None

    @property
    def merges(self) -> bool:
        """Whether any of its adapter layers can be merged."""
        layers = [*self.layers.values(), self.parameters_layer, self.other_layer]
        return any(layer is not None and layer.mergeable for layer in layers)

    @property
    def home(self) -> str:
        """What the names of its modules begin with: its file's, or its folder's where it has one for itself."""
        file = self.config.__module__
        folder = file.rpartition(".")[0]
        return f"{folder}." if folder.endswith(f".{self.name.value.lower()}") else file

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
                f"Target module {path!r} is not supported: {self.name.value} cannot be put on a {type(base).__name__}. "
                f"Currently, only the following modules are supported: {supported}. Name the layers inside it, or exclude it "
                "with `exclude_modules`."
            )
        variant = None if self.variant is None else self.variant(config, kind, base)
        chosen = self.layers[kind] if variant is None else variant
        return self.divided_layers[chosen] if chosen in self.divided_layers and is_tensor_parallel(base) else chosen


def register(method: Method) -> Method:
    """Make `method` known.

    Raises:
        KeyError: its name is taken.
    """
    if method.name in _METHODS:
        raise KeyError(f"{method.name.value} is registered already, by {_METHODS[method.name].config.__module__}")
    # Programs add their own models to the tables of defaults, each to that of one method: they are its own, and can be
    # written to.
    targets, modules = dict(method.default_targets), {field: dict(t) for field, t in method.default_modules.items()}
    _METHODS[method.name] = method = method._replace(default_targets=targets, default_modules=modules)
    return method


def register_question(name: str, answer: Callable[..., object]) -> None:
    """Let models with adapters of any method have a function of this name; it is called with the adapters first."""
    _QUESTIONS[name] = answer


def question(name: str) -> Callable[..., object] | None:
    """The function of this name that models with adapters of any method have; None where there is none."""
    return _QUESTIONS.get(name)


def all_methods() -> Mapping[PeftType, Method]:
    """Every method that is known, in the order of the files' names."""
    find_methods()
    return MappingProxyType(_METHODS)


def method_of(config: PeftConfig) -> Method:
    """The record of a config's method.

    Raises:
        UnknownMethodError: (a KeyError) there is no such method.
    """
    return method_named(config.peft_type, "the config")


def method_named(peft_type: object, place: str) -> Method:
    """The method of a `peft_type`; `place` says where it was read, for the message.

    Raises:
        CheckpointError: (a ValueError) the name is not a string.
        UnknownMethodError: (a KeyError) there is no such method.
    """
    name = class_of(peft_type, place).method
    assert name is not None
    return _METHODS[name]


# By class, so that the methods are looked through once for each.
_of_layers: dict[type, Method | None] = {}


def method_of_layer(layer: AdapterLayer) -> Method | None:
    """The method that an adapter layer is of; None for what adapters of any method have beside their own layers."""
    cls = type(layer)
    if cls not in _of_layers:
        _of_layers[cls] = _method_of_class(cls)
    return _of_layers[cls]


def _method_of_class(cls: type) -> Method | None:
    for method in all_methods().values():
        if cls in (*method.layers.values(), method.other_layer, method.parameters_layer):
            return method
    # Variants, which no record lists: they stand in the method's own file or folder.
    return next((method for method in all_methods().values() if cls.__module__.startswith(method.home)), None)
