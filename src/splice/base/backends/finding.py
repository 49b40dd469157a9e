"""Which backend a layer belongs to, told by the types of the layer and of its weight."""

from __future__ import annotations

import torch
from torch import nn

from splice.base.backends import aqlm, awq, bnb_4bit, bnb_8bit, eetq, fp8, gptq, hqq, inc, torchao
from splice.base.backends.backend import Backend
from splice.base.foreign_models import full_shape

BACKENDS: tuple[Backend, ...] = tuple(
    module.BACKEND for module in (bnb_4bit, bnb_8bit, torchao, hqq, gptq, awq, aqlm, eetq, inc, fp8)
)

# By class, so that ancestors are walked once for each class and not once for each layer.
_found: dict[tuple[type, type, type], Backend | None] = {}
_linear: dict[type, Backend | None] = {}


def backend_of(layer: nn.Module) -> Backend | None:
    """The backend that stores the weight of `layer`; None where it is plain, or in a form that nobody here knows."""
    weight = layer._parameters.get("weight")
    # The data too: some wrap a tensor of a class of their own in a plain parameter.
    inner = type(None) if weight is None else type(weight.data) if type(weight) is nn.Parameter else type(weight)
    key = type(layer), type(weight), inner
    if key not in _found:
        _found[key] = next((each for each in BACKENDS if any(each.owns(type(layer), cls) for cls in key[1:])), None)
    return _found[key]


def numel_stood_for(parameter: torch.Tensor) -> int:
    """The number of values that `parameter` is, or that the codes in it stand for; of all processes' parts of it."""
    # Asked of parameters in great number: first what nearly all of them are.
    codes = None if type(parameter) is nn.Parameter else bnb_4bit.codes_in(parameter)
    return full_shape(parameter).numel() if codes is None else codes


def linear_backend(cls: type) -> Backend | None:
    """The backend all of whose layers are linear, and of which `cls` is one, though it is no `nn.Linear`."""
    if cls not in _linear:
        _linear[cls] = next((each for each in BACKENDS if each.is_linear and each.owns(cls, type(None))), None)
    return _linear[cls]
