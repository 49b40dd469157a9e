"""Plain weights: floats in a parameter of torch's own class, of the shape that the layer's sizes say.

Layers that no other backend owns are asked here, also those in a form that nobody knows: then the answer is why not.
"""

from __future__ import annotations

import torch
from torch import nn

from splice.base.bare import original_class

# Their parameters hold codes, now or as soon as they are moved, whatever dtype and shape these tell.
_PACKING_LIBRARIES = frozenset({"bitsandbytes", "torchao"})


def holds_codes(parameter: torch.Tensor) -> bool:
    """Whether `parameter` is of a class of a library that packs weights."""
    # The data too: some wrap a tensor of a class of their own in a plain parameter.
    classes = (type(parameter), type(parameter.data))
    return any(cls.__module__.partition(".")[0] in _PACKING_LIBRARIES for cls in classes)


def why_not_plain(layer: nn.Module, name: str, shapes: tuple[tuple[int, ...], ...]) -> str:
    """Why the parameter of `layer` of this name is no plain tensor; empty where it is.

    Args:
        layer: that no other backend owns.
        name: of a parameter that it has.
        shapes: those that it may have; empty where any is right.
    """
    weight = layer._parameters[name]
    assert weight is not None
    if holds_codes(weight):
        return f"its {name} is of class {type(weight).__name__}"
    if not (weight.is_floating_point() or weight.is_complex()):
        return f"its {name} is stored as {weight.dtype}"
    if weight.element_size() == 1 and not original_class(layer).__module__.startswith("torch."):
        return f"its {name} is stored as {weight.dtype}, in a way of its own"
    # Packed bits may be kept in a floating dtype. A weight without values is one that is spread over processes.
    if shapes and weight.numel() and tuple(weight.shape) not in shapes:
        return f"its {name} has the shape {list(weight.shape)} in the place of {list(shapes[0])}"
    return ""
