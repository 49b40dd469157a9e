"""Under which names the reference keeps what is in memory."""

from __future__ import annotations

from splice.surgery.adapted import Adapted


def is_whole(layer: Adapted) -> bool:
    """Whether the layer only carries copies of itself, or biases, and no method's tensors."""
    return all(adapter.names.base != "base_layer." for adapter in layer.splice_host.layers.values())
