"""AWQ, in the layers of autoawq and gptqmodel: packed codes as buffers, of a class for each kernel.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv 2306.00978. The scales
were chosen with data: another weight cannot be stored so without any.
"""

from __future__ import annotations

from splice.base.backends.backend import BUFFERS, Backend, Foreign, Place, bias_attribute, is_of
from splice.base.backends.identity import weight_by_identity

_CLASSES = (
    "WQLinear_GEMM",
    "WQLinear_GEMV",
    "WQLinear_GEMVFast",
    "WQLinear_Exllama",
    "WQLinear_ExllamaV2",
    "WQLinear_Marlin",
)


def _owns(layer: type, weight: type) -> bool:
    return is_of(layer, "awq", *_CLASSES) or is_of(layer, "gptqmodel", "AWQuantLinear")


def _describe(layer: Foreign) -> str:
    return f"groups of {layer.group_size}"


def _why_unwritable(layer: Foreign) -> str:
    return "its scales were chosen with data, which is not there any more"


BACKEND = Backend(
    name="awq",
    owns=_owns,
    is_linear=True,
    dense=weight_by_identity,
    describe=_describe,
    why_unwritable=_why_unwritable,
    bias=bias_attribute,
    bias_place=Place(BUFFERS, "bias"),
)
