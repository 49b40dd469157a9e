"""The tensors of a base layer as they are without adapters, for methods whose mathematics needs them in a forward.

They are looked up at every use: they may have been moved, replaced, or merged into since.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from splice.base.dense import as_now, in_linear_layout
from splice.base.offload import at_hand
from splice.base.sharding import whole_tensors
from splice.base.weight_access import bias_of, check_readable, computed_weight, dense_from, dense_weight, is_plain
from splice.kinds.host import host_of, in_order
from splice.kinds.layer import AdapterLayer


def original_tensor(layer: nn.Module, name: str) -> torch.Tensor | None:
    """The tensor as the base stores it; the one before the first merge, while adapters are merged."""
    own, host = layer._parameters.get(name), host_of(layer)
    if own is None and name == "bias":
        own = cast("nn.Parameter | None", bias_of(layer))
    if host is None:
        return own
    if host.stored is not None:
        for place, before in host.stored.items():
            if place.name == name:
                return cast(torch.Tensor, before)
    if name in host.displaced:
        return host.displaced[name]
    if name in host.shelved and own is not None:
        shelf, entry = host.shelved[name]
        return as_now(shelf.read(entry), own)
    return own if own is None or name not in host.originals else as_now(host.originals[name], own)


def original_weight(layer: nn.Module) -> torch.Tensor:
    """The weight, (out, in) if the layer is linear; without a graph.

    Raises:
        UnsupportedFeatureError: it is stored in a form that cannot be read.
    """
    weight = original_tensor(layer, "weight")
    if weight is None:
        weight = computed_weight(layer)
    # First what nearly all weights are, since some methods ask at every call.
    if (
        weight is None
        or type(weight) is not nn.Parameter
        or not weight.is_floating_point()
        or weight.element_size() == 1
    ):
        check_readable(layer, "", "the method")
        if not is_plain(layer):
            host = host_of(layer)
            return dense_weight(layer) if host is None or not host.stored else dense_from(layer, host.stored)
    assert weight is not None
    return in_linear_layout(layer, weight.detach())


def weight_at_hand(layer: nn.Module) -> torch.Tensor:
    """`original_weight` of any layer of the network, also of one whose tensors are kept elsewhere, or divided."""
    with at_hand(layer.modules()), whole_tensors((layer._parameters, name) for name in list(layer._parameters)):
        return original_weight(layer)


def tensor_in_use(layer: nn.Module, name: str, asking: AdapterLayer) -> torch.Tensor | None:
    """What stands below all adapters now: the tensor of the base, nothing merged into it, or one that an adapter brings.

    Of a mixed batch the adapter layer that is `asking` has its rows for itself.
    """
    host = host_of(layer)
    if host is not None and host.shows:
        choice = host.selection.current()
        names = (*choice.names, *host.merged)
        others = [host.layers[active] for active in names if active in host.layers]
        for adapter in others if choice.rows is None else [asking]:
            shown = adapter.shown(layer)
            if name in shown:
                return shown[name]
    return original_tensor(layer, name)


def scaled_bias(
    adapter: AdapterLayer, tensors: Mapping[str, torch.Tensor], factors: torch.Tensor
) -> torch.Tensor | None:
    """What merging an adapter that scales outputs with `factors` (out), but for the base's bias, adds to that of `tensors`.

    What others have added to it is scaled like all else that they add. None where they have added nothing, or there is none.
    """
    below = tensor_in_use(adapter.base, "bias", adapter)
    if below is None or tensors["bias"] is below:
        return None
    return (factors - 1) * (tensors["bias"] - below.detach())


def gets_base_output(adapter: AdapterLayer) -> bool:
    """Whether what this adapter layer is put around now is the base alone: nothing is merged, no other adapter is below."""
    host = host_of(adapter.base)
    if host is None:
        return True
    if host.merged:
        return False
    choice = host.selection.current()
    if choice.rows is not None or len(choice.names) < 2:  # a row has one adapter
        return True
    return host.layers[in_order(host.layers, choice.names)[0]] is adapter
