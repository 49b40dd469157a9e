"""AQLM: groups of weights as sums of vectors from codebooks, in a layer that is no `nn.Linear`.

Egiazarian et al., "Extreme Compression of Large Language Models via Additive Quantization", arXiv 2401.06118. The codebooks
were trained: another weight cannot be stored so.
"""

from __future__ import annotations

from splice.base.backends.backend import Backend, Foreign, is_of
from splice.base.backends.identity import weight_by_identity


def _owns(layer: type, weight: type) -> bool:
    return is_of(layer, "aqlm", "QuantizedLinear")


def _describe(layer: Foreign) -> str:
    return f"{layer.num_codebooks}x{layer.nbits_per_codebook} bit"


def _why_unwritable(layer: Foreign) -> str:
    return "its codebooks were trained for the weight that it has"


BACKEND = Backend(
    name="aqlm",
    owns=_owns,
    is_linear=True,
    dense=weight_by_identity,
    describe=_describe,
    why_unwritable=_why_unwritable,
)
