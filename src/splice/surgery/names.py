"""Under which names the reference keeps what is in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from splice.base.layers import ADAPTERS
from splice.kinds.host import Host
from splice.surgery.adapted import Adapted


def own_names(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name of every parameter and buffer of the base layer, also those that `state_dict` leaves out."""
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if not name.startswith(f"{ADAPTERS}."):
            yield name, tensor


def base_front(host: Host) -> str:
    """What the reference puts before the names of the base's own tensors on an adapted layer."""
    layers = list(host.layers.values())
    return next((layer for layer in layers if layer.base_infix), layers[0]).base_front(host.path)


def is_whole(layer: Adapted) -> bool:
    """Whether the layer only carries copies of itself, or biases, and no method's tensors."""
    return all(adapter.base_infix != "base_layer." for adapter in layer.splice_host.layers.values())
