"""The tensors of a base layer as they are without adapters, for methods whose mathematics needs them in a forward.

They are looked up at every use: they may have been moved, replaced, or merged into since.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from splice.base.dense import as_now, in_linear_layout
from splice.base.weight_access import check_readable, computed_weight
from splice.kinds.host import host_of


def original_tensor(layer: nn.Module, name: str) -> torch.Tensor | None:
    """The tensor as the base stores it; the one before the first merge, while adapters are merged."""
    own, host = layer._parameters.get(name), host_of(layer)
    if host is None:
        return own
    if name in host.displaced:
        return host.displaced[name]
    return own if own is None or name not in host.originals else as_now(host.originals[name], own)


def original_weight(layer: nn.Module) -> torch.Tensor:
    """The weight, (out, in) if the layer is linear; without a graph.

    Raises:
        UnsupportedFeatureError: it is stored in a form that cannot be read.
    """
    weight = original_tensor(layer, "weight")
    if weight is None:
        weight = computed_weight(layer)
    if weight is None or not weight.is_floating_point():
        check_readable(layer, "", "the method")
    assert weight is not None
    return in_linear_layout(layer, weight.detach())


def tensor_in_use(layer: nn.Module, name: str) -> torch.Tensor | None:
    """What stands below all adapters now: the tensor of the base, nothing merged into it, or one that an adapter brings."""
    host = host_of(layer)
    if host is not None and host.shows:
        for active in (*host.selection.current().names, *host.merged):
            adapter = host.layers.get(active)
            shown = {} if adapter is None else adapter.shown(layer)
            if name in shown:
                return shown[name]
    return original_tensor(layer, name)


def scaled_bias(layer: nn.Module, tensors: Mapping[str, torch.Tensor], factors: torch.Tensor) -> torch.Tensor | None:
    """What merging adds to the bias among `tensors` where outputs are scaled with `factors` (out), but for the base's bias.

    What others have added to it is scaled like all else that they add. None where they have added nothing, or there is none.
    """
    below = tensor_in_use(layer, "bias")
    if below is None or tensors["bias"] is below:
        return None
    return (factors - 1) * (tensors["bias"] - below.detach())
