"""What programs read and call on layers with LoRA, by the reference's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from splice.config import copy_config
from splice.errors import UnsupportedFeatureError
from splice.kinds.host import Host
from splice.kinds.layer import AdapterLayer
from splice.methods.lora.config import active_variants
from splice.methods.lora.inits import LOFTQ, check_init, takes_from_base
from splice.methods.lora.layers import LowRank

# Containers that each layer has, whatever it is.
CONTAINERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def _variant(layer: AdapterLayer) -> AdapterLayer | None:
    """The layer itself, where it is one of a relative of LoRA."""
    return layer if active_variants(layer.config) else None


LAYER_VIEWS: Mapping[str, Callable[[AdapterLayer], object]] = MappingProxyType(
    {
        "use_dora": lambda layer: layer.config.use_dora,
        "use_rslora": lambda layer: layer.config.use_rslora,
        "lora_bias": lambda layer: layer.config.lora_bias,
        "lora_variant": _variant,
    }
)


def reset_lora_parameters(host: Host, adapter_name: str, init_lora_weights: bool | str) -> None:
    """Start the adapter's tensors on this layer anew; with False, leave them. An unknown adapter is ignored.

    Raises:
        ValueError: the initialisation is unknown.
        UnsupportedFeatureError: it changes the base, or the adapter is of a relative of LoRA.
    """
    layer = host.layers.get(adapter_name)
    if not isinstance(layer, LowRank) or init_lora_weights is False:
        return
    check_init(init_lora_weights)
    if takes_from_base(init_lora_weights) or init_lora_weights == LOFTQ or _variant(layer) is not None:
        raise UnsupportedFeatureError(
            f"{host.place}: adapter {adapter_name!r} cannot start anew as init_lora_weights={init_lora_weights!r}, because "
            "that is more than new values for A and B. Delete it, and add an adapter with such a config."
        )
    config = copy_config(layer.config, init_lora_weights=init_lora_weights)
    tensors = {suffix: torch.empty_like(tensor, device="cpu") for suffix, tensor in layer.named_slots()}
    with torch.no_grad():
        type(layer).initialise(tensors, host.base, config)
        for suffix, tensor in layer.named_slots():
            tensor.copy_(tensors[suffix])
