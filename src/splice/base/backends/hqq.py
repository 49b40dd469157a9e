"""HQQ: groups of codes with a scale and a zero each, fitted without data, in a layer that is no `nn.Linear`.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", https://mobiusml.github.io/hqq_blog.
The codes are a parameter `W_q`, what they mean stands in a dict beside it, and the bias is no parameter.
"""

from __future__ import annotations

import torch
from torch import nn

from splice.base.backends.backend import OWN, PARAMETERS, Backend, Foreign, Place, Stored, is_of, library_of

_CODES, _META, _BIAS = Place(PARAMETERS, "W_q"), Place(OWN, "meta"), Place(OWN, "bias")


def _owns(layer: type, weight: type) -> bool:
    return is_of(layer, "hqq", "HQQLinear")


def _features(layer: Foreign) -> tuple[int, int]:
    # Not `layer.in_features`: one that was read from a file has none.
    size_out, size_in = layer.meta["shape"]
    return size_in, size_out


def _dense(layer: Foreign) -> torch.Tensor:
    dense: torch.Tensor = layer.dequantize()
    return dense


def _encode(layer: Foreign, dense: torch.Tensor) -> Stored:
    was, settings = layer.meta, layer.quant_config["weight_quant_params"]
    quantizer = library_of(layer, "hqq.core.quantize").Quantizer
    codes, meta = quantizer.quantize(dense, device=str(layer.W_q.device), compute_dtype=layer.compute_dtype, **settings)
    new = {**meta, **{name: was[name] for name in was if name not in meta}}
    for name in ("scale", "zero"):
        new[name] = meta[name].to(device=was[name].device, dtype=was[name].dtype)
    return {_CODES: nn.Parameter(codes, requires_grad=False), _META: new}


def _why_unwritable(layer: Foreign) -> str:
    if layer.quant_config is None:
        return "it was read from a file that does not say how it was quantised"
    if layer.meta["quant_scale"] or layer.meta["quant_zero"] or "scale" not in layer.meta:
        return "its scales are quantised or kept elsewhere"
    return ""


def _describe(layer: Foreign) -> str:
    return f"{layer.meta['nbits']} bit, groups of {layer.meta['group_size']}"


def _dtype(layer: Foreign) -> torch.dtype | None:
    found: torch.dtype = layer.compute_dtype
    return found


def _bias(layer: Foreign) -> torch.Tensor | None:
    found: torch.Tensor | None = _BIAS.of(layer).get(_BIAS.name)
    return found


BACKEND = Backend(
    name="hqq",
    owns=_owns,
    is_linear=True,
    dense=_dense,
    describe=_describe,
    why_unwritable=_why_unwritable,
    encode=_encode,
    places=(_CODES, _META),
    features=_features,
    dtype=_dtype,
    bias=_bias,
    bias_place=_BIAS,
)
