"""Reports about a model with adapters: per layer, and summed up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from splice.base.backends.finding import backend_of
from splice.base.bare import original_class
from splice.kinds.layer import AdapterLayer
from splice.kinds.slot import Role
from splice.surgery.adapted_layer import Adapted, is_whole
from splice.surgery.tuner import Tuner, tuner_of

Irregular = Literal["irregular"]


@dataclass
class LayerStatus:
    """The status of one adapted layer."""

    # Its path, relative to the base model's wrapper: `model.lin0`.
    name: str
    # File of the first adapter's layer class, and the base layer's own class: `layers.Linear`.
    module_type: str
    # False while adapters are switched off (`disable_adapter`).
    enabled: bool
    # Adapters that are selected and on this layer.
    active_adapters: list[str]
    # Adapters that are in its weights now, in the order they were merged.
    merged_adapters: list[str]
    # Adapter -> whether its tensors are trained; "irregular" where some are.
    requires_grad: dict[str, bool | Irregular]
    # Adapters that are on this layer.
    available_adapters: list[str]
    # Adapter -> types of the devices that its tensors are on ("cpu", "cuda").
    devices: dict[str, list[str]]
    # How the base's weight is quantised; None where it is not.
    quantization_backend: str | None


@dataclass
class ModelStatus:
    """The same for a whole model; a value on which its layers disagree is "irregular"."""

    # Class of the base model.
    base_model_type: str
    # What the reference calls the tuner of the first adapter's method: `LoraModel`.
    adapter_model_type: str
    # Adapter -> its method.
    peft_types: dict[str, str]
    # How many numbers are trained, base and adapters together; shared ones count once.
    trainable_params: int
    # How many numbers there are, base and adapters together.
    total_params: int
    # How many layers are adapted.
    num_adapter_layers: int
    # False while adapters are switched off.
    enabled: bool | Irregular
    # Adapters that are selected.
    active_adapters: list[str] | Irregular
    # Adapters that are in the weights now.
    merged_adapters: list[str] | Irregular
    # Adapter -> whether its tensors are trained.
    requires_grad: dict[str, bool | Irregular]
    # All adapters, sorted.
    available_adapters: list[str]
    # Adapter -> types of the devices that its tensors are on.
    devices: dict[str, list[str]]
    # How the base's weights are quantised; None where they are not.
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """One entry for every adapted layer.

    Raises:
        ValueError: the model carries no adapters.
    """
    tuner = _tuner(model)
    return [_status_of(path, layer) for path, layer in tuner.adapted.items() if layer.splice_host.layers]


def _tuner(model: nn.Module) -> Tuner:
    tuner, _ = tuner_of(model)
    if not tuner.adapted:
        raise ValueError("No adapter layers found in the model, please ensure that it carries an adapter.")
    return tuner


def _status_of(path: str, layer: Adapted) -> LayerStatus:
    host = layer.splice_host
    module = cast(nn.Module, layer)
    first = next(iter(host.layers.values()))
    file = type(first).__module__.rpartition(".")[2]
    return LayerStatus(
        name=f"model.{path}",
        module_type=f"{file}.{original_class(module).__name__}",
        enabled=host.selection.enabled,
        active_adapters=[n for n in host.selection.active if n in host.layers or not is_whole(layer)],
        merged_adapters=list(host.merged),
        requires_grad={
            name: _agreed(r[n].requires_grad for r, n, _ in a.tensors_by_role(Role.TRAINED))
            for name, a in host.layers.items()
        },
        available_adapters=sorted(host.layers),
        devices={name: _devices(adapter) for name, adapter in host.layers.items()},
        quantization_backend=None if (backend := backend_of(module)) is None else backend.name,
    )


def _devices(adapter: AdapterLayer) -> list[str]:
    return sorted({registry[name].device.type for registry, name, _ in adapter.registered.values()})


def _agreed(flags: Iterable[bool | Irregular]) -> bool | Irregular:
    # A word in place of None, as the reference has it: None is false, and would read as "frozen".
    values = set(flags)
    return values.pop() if len(values) == 1 else "irregular"


def get_model_status(model: nn.Module) -> ModelStatus:
    """The status of a whole model.

    Raises:
        ValueError: the model carries no adapters.
    """
    tuner = _tuner(model)
    layers = get_layer_status(model)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    parameters: list[torch.Tensor] = list(tuner.parameters())
    return ModelStatus(
        base_model_type=type(tuner.model).__name__,
        adapter_model_type=f"{type(next(iter(tuner.peft_config.values()))).__name__.removesuffix('Config')}Model",
        peft_types={name: str(config.peft_type).rpartition(".")[2] for name, config in tuner.peft_config.items()},
        trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
        total_params=sum(p.numel() for p in parameters),
        num_adapter_layers=len(layers),
        enabled=tuner.selection.enabled,
        active_adapters=_same([layer.active_adapters for layer in layers]),
        merged_adapters=list(tuner.merged),
        requires_grad={n: _agreed(_flags(layers, n)) for n in names},
        available_adapters=names,
        devices={n: sorted({d for layer in layers for d in layer.devices.get(n, ())}) for n in names},
        quantization_backend=_one_backend(layers),
    )


def _one_backend(layers: Iterable[LayerStatus]) -> str | None:
    names = sorted({layer.quantization_backend for layer in layers if layer.quantization_backend is not None})
    return " and ".join(names) or None


def _same(values: list[list[str]]) -> list[str] | Irregular:
    return values[0] if all(value == values[0] for value in values) else "irregular"


def _flags(layers: Iterable[LayerStatus], name: str) -> Iterable[bool | Irregular]:
    return (layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
