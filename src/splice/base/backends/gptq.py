"""GPTQ, in the layers of gptqmodel and auto-gptq: packed codes as buffers, of a class for each kernel.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323. The
codes were chosen with data, so that they make up for each other's error: another weight cannot be stored so without any.
"""

from __future__ import annotations

from splice.base.backends.backend import BUFFERS, Backend, Foreign, Place, bias_attribute, is_of
from splice.base.backends.identity import weight_by_identity


def _owns(layer: type, weight: type) -> bool:
    # Classes for other formats are in the same library: those are called after them.
    own = is_of(layer, "gptqmodel", "GPTQQuantLinear") or is_of(layer, "auto_gptq", "QuantLinear", "QuantLinearCuda")
    return own and not any("awq" in base.__name__.lower() for base in layer.__mro__)


def _describe(layer: Foreign) -> str:
    return f"{layer.bits} bit, groups of {layer.group_size}"


def _why_unwritable(layer: Foreign) -> str:
    return "its codes were chosen with data, which is not there any more"


BACKEND = Backend(
    name="gptq",
    owns=_owns,
    is_linear=True,
    dense=weight_by_identity,
    describe=_describe,
    why_unwritable=_why_unwritable,
    bias=bias_attribute,
    bias_place=Place(BUFFERS, "bias"),
    grouped_inputs=True,
)
