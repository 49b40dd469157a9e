"""Whether a base layer's weight can be read and written as a dense tensor, and reading it.

A weight may be codes that only its own layer understands (integers, packed bits, classes of other libraries), or worked out
of other parameters at every use (weight normalisation). The first can be neither read nor written, the second only read.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from splice.base.bare import original_class
from splice.base.foreign_models import holds_codes
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
    weight = layer._parameters.get(name)
    if weight is None:
        return "" if name == "weight" and computed_weight(layer) is not None else f"it has no parameter {name!r}"
    if holds_codes(weight):
        return f"its {name} is of class {type(weight).__name__}"
    if not (weight.is_floating_point() or weight.is_complex()):
        return f"its {name} is stored as {weight.dtype}"
    if weight.element_size() == 1 and not original_class(layer).__module__.startswith("torch."):
        return f"its {name} is stored as {weight.dtype}, in a way of its own"
    # Packed bits may be kept in a floating dtype. A weight without values is one that is spread over processes.
    if name == "weight" and kind_of(layer) in _WITH_SHAPE and weight.numel():
        wanted = weight_shape(layer)
        if tuple(weight.shape) not in (wanted, wanted[::-1] if _is_transposed(layer) else wanted):
            return f"its {name} has the shape {list(weight.shape)} in the place of {list(wanted)}"
    return ""


_WITH_SHAPE = (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR, LayerKind.EMBEDDING, *_CONVOLUTIONS)


def _is_transposed(layer: nn.Module) -> bool:
    return kind_of(layer) is LayerKind.TRANSPOSED_LINEAR


def why_unwritable(layer: nn.Module, name: str = "weight") -> str:
    """Why a dense tensor cannot be put in the place of that parameter; empty where it can."""
    if name == "weight" and layer._parameters.get(name) is None and computed_weight(layer) is not None:
        return (
            "its weight is worked out of other parameters at every use (`torch.nn.utils.parametrize`, `weight_norm`). Make "
            "it a plain one before loading the adapter: `remove_parametrizations`, `remove_weight_norm`"
        )
    reason = why_unreadable(layer, name)
    return (
        f"{reason}. Nothing here knows how to write it; load the base model without quantisation to merge"
        if reason
        else ""
    )


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
