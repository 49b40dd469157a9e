"""Whether a base layer's weight can be read and written as a dense tensor, and reading it.

A weight may be stored in a form that a backend knows (`backends/`), be codes that only its own layer understands, or worked
out of other parameters at every use (weight normalisation). The second can be neither read nor written, the third only read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from splice.base.backends.backend import Stored, place_all
from splice.base.backends.finding import backend_of
from splice.base.backends.plain import why_not_plain
from splice.base.bare import original_class, without_adapters
from splice.base.layers import LayerKind, features, kernel_size, kind_of
from splice.errors import UnsupportedFeatureError

_CONVOLUTIONS = (LayerKind.CONV1D, LayerKind.CONV2D, LayerKind.CONV3D)


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of the dense weight: (out, in) of linear layers however they store it, else as the base's own."""
    # From what the layer says of itself: a weight that is packed, or worked out of others, has no shape to ask for.
    first, second = features(layer)
    if kind_of(layer) is LayerKind.EMBEDDING:
        return first, second
    if kind_of(layer) in _CONVOLUTIONS:
        assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return second, first // layer.groups, *kernel_size(layer)
    return second, first


def computed_weight(layer: nn.Module) -> torch.Tensor | None:
    """The weight that `layer` works out of other parameters at every use; None where it does not."""
    parametrizations = layer._modules.get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict) and "weight" in parametrizations:
        found: torch.Tensor = parametrizations["weight"]()
        return found
    # The older way: a hook that works the weight out before each call. What it left last may be out of date.
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            weight: torch.Tensor = hook.compute_weight(layer)
            return weight
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return hook.compute_weight(layer, do_power_iteration=False)
    return None


def why_unreadable(layer: nn.Module, name: str = "weight") -> str:
    """Why the parameter of `layer` of this name cannot be read as a dense tensor; empty where it can."""
    backend = backend_of(layer)
    if backend is not None and name == "weight":
        return backend.why_unreadable(layer)
    if layer._parameters.get(name) is None:
        if name == "weight" and computed_weight(layer) is not None:
            return ""
        return "" if name == "bias" and bias_of(layer) is not None else f"it has no parameter {name!r}"
    shapes: tuple[tuple[int, ...], ...] = ()
    if name == "weight" and kind_of(layer) in _WITH_SHAPE:
        wanted = weight_shape(layer)
        shapes = (wanted, wanted[::-1]) if kind_of(layer) is LayerKind.TRANSPOSED_LINEAR else (wanted,)
    return why_not_plain(layer, name, shapes)


_WITH_SHAPE = (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR, LayerKind.EMBEDDING, *_CONVOLUTIONS)


def why_unwritable(layer: nn.Module, name: str = "weight") -> str:
    """Why a dense tensor cannot be put in the place of that parameter; empty where it can."""
    if name == "weight" and layer._parameters.get(name) is None and computed_weight(layer) is not None:
        return (
            "its weight is worked out of other parameters at every use (`torch.nn.utils.parametrize`, `weight_norm`). Make "
            "it a plain one before loading the adapter: `remove_parametrizations`, `remove_weight_norm`"
        )
    reason = why_unreadable(layer, name)
    backend = backend_of(layer)
    if backend is None or name != "weight":
        return (
            f"{reason}. Nothing here knows how to write it; load the base model without quantisation to merge"
            if reason
            else ""
        )
    if not reason:
        reason = backend.why_unwritable(layer)
        return f"{reason}. Merge with `merge_and_unload(dequantize=True)`, into a dense model" if reason else ""
    return f"{reason}. Load the base model without quantisation to merge"


def is_plain(layer: nn.Module) -> bool:
    """Whether no backend but torch's own way of storing a weight has anything to do with `layer`."""
    return backend_of(layer) is None


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight as a dense tensor in the layout of the base, without a graph; of a plain layer the very values.

    Raises:
        UnsupportedFeatureError: it is stored in a form that cannot be read.
    """
    backend = backend_of(layer)
    if backend is None:
        weight = layer._parameters.get("weight")
        found = computed_weight(layer) if weight is None else weight
        if found is None or not found.is_floating_point():
            check_readable(layer, "", "this")
        assert found is not None
        return found.detach()
    check_readable(layer, "", "this")
    with torch.no_grad():
        return backend.dense(layer)


def as_if_stored(layer: nn.Module, stored: Stored) -> nn.Module:
    """`layer` without adapters, if its weight were `stored` so; the layer itself stays as it is."""
    bare = without_adapters(layer)
    place_all(bare, stored)
    return bare


def dense_from(layer: nn.Module, stored: Stored) -> torch.Tensor:
    """`dense_weight` of `layer` if its weight were `stored` so."""
    backend = backend_of(layer)
    assert backend is not None
    with torch.no_grad():
        return backend.dense(as_if_stored(layer, stored))


def bias_of(layer: nn.Module) -> torch.Tensor | None:
    """The bias of `layer`, also of a layer that does not keep it as a parameter; None for none."""
    own = layer._parameters.get("bias")
    if own is None:
        backend = backend_of(layer)
        own = None if backend is None else cast("nn.Parameter | None", backend.bias(layer))
    return own


def dense_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of `layer` by name: its parameters, or what it stores in another way as dense ones of 32 bits or more."""
    if is_plain(layer):
        return {name: tensor for name, tensor in layer._parameters.items() if tensor is not None}
    weight, bias = dense_weight(layer), bias_of(layer)
    # Half precision would round a second time what is rounded in a moment.
    found = {"weight": weight if weight.element_size() > 2 else weight.float()}
    return found if bias is None else {**found, "bias": bias}


_ADVICE = (
    "Nothing here knows how to read it. Load the base model without quantisation to do this, or use a method that needs no "
    "weight"
)


def check_showable(layer: nn.Module, path: str, names: Iterable[str]) -> None:
    """Raise where another tensor cannot be shown in the place of the layer's own while it computes.

    Raises:
        UnsupportedFeatureError: the layer works that tensor out itself.
    """
    parametrizations = layer._modules.get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict):
        for name in names:
            if name in parametrizations:
                raise UnsupportedFeatureError(
                    f"{path}: the adapter puts a {name} of its own in the place of the layer's, and that is worked out "
                    "of other parameters (`torch.nn.utils.parametrize`). Make it a plain one first: "
                    "`remove_parametrizations`."
                )


def check_readable(layer: nn.Module, path: str, what: str) -> None:
    """Raise where the weight of the layer at `path` cannot be read; `what` needs it.

    Raises:
        UnsupportedFeatureError: the weight is stored in a form that is not known here.
    """
    reason = why_unreadable(layer)
    if reason:
        raise UnsupportedFeatureError(
            f"{path or 'the layer'}: {what} needs the base weight, and the layer, a {original_class(layer).__name__}, keeps "
            f"it in a form that cannot be read: {reason}. {_ADVICE}."
        )
