"""Where each layer of a network that accelerate has dispatched computes, and putting a cache there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from splice.base.foreign_models import field_of, text_config

Device: TypeAlias = "int | str | torch.device"
# Where weights are kept that compute somewhere else.
_KEPT = ("cpu", "disk")


class CachedLayer(Protocol):
    """What a cache of transformers has for one layer."""

    # Of all tokens so far; None before the first.
    keys: torch.Tensor | None
    values: torch.Tensor | None


def get_layer_device_map(model: nn.Module) -> dict[int, Device] | None:
    """The place of a layer among the others -> the device on which it computes; None of a model on one device.

    What is kept in memory or on disk between calls computes on the first device that is neither.

    Raises:
        RuntimeError: a layer has no device.
    """
    found: Mapping[str, Device] = vars(model).get("hf_device_map") or {}
    main = next((device for device in found.values() if device not in _KEPT), None)
    if main is None:  # also where all of it computes in memory
        return None
    config: Any = text_config(model)
    layers = field_of(config, "num_hidden_layers")
    count = layers if isinstance(layers, int) else 0
    devices: dict[int, Device] = dict.fromkeys(range(count), main) if "" in found else {}
    for path, device in found.items():
        numbers = re.findall(r"\.(\d+)(?=\.)", f".{path}.")
        if numbers and int(numbers[0]) < count:
            devices[int(numbers[0])] = main if device in _KEPT else device
    missing = sorted(set(range(count)) - devices.keys())
    if missing:
        raise RuntimeError(
            f"layer {missing[0]} has not been mapped to a device: `hf_device_map` names {list(found)}. Name each layer, or "
            "the whole model by ''."
        )
    return devices


def map_cache_to_layer_device_map(model: nn.Module, cache: Any) -> None:
    """Move what a cache holds of each layer to the device on which the layer computes."""
    devices = get_layer_device_map(model)
    layers: list[CachedLayer] = list(cache.layers)
    for place, layer in enumerate(layers):
        if devices is not None and layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = (each.to(devices[place]) for each in (layer.keys, layer.values))
