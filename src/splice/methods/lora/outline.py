"""LoRA adapters as their files show them, without torch: rank, scale, and the factors of the update.

It is read without the method, since `splice inspect` needs neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

from splice.checkpoint.outline import Array, Factors, Fields, Outline, Shapes, register_outline
from splice.checkpoint.patterns import value_for
from splice.checkpoint.types import PeftType

# The pairs of factors: of linear layers and convolutions, and of embeddings.
_LINEAR, _EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")


def _planned(fields: Fields, path: str) -> int | None:
    rank = value_for(_pattern(fields, "rank_pattern"), path, fields.get("r", 8))
    return rank if isinstance(rank, int) else None


def _rank(fields: Fields, path: str, shapes: Shapes) -> int | None:
    # Rows of A, and not what the config says, with which they are compared. Of stacked experts A has the rows of all.
    if fields.get("target_parameters"):
        return None
    return next((shapes[down][0] for down, _ in (_LINEAR, _EMBEDDING) if shapes.get(down)), None)


def alpha_of(fields: Fields, path: str) -> float | None:
    """The alpha that the config gives to the layer at `path`; None where that is no number."""
    alpha = value_for(_pattern(fields, "alpha_pattern"), path, fields.get("lora_alpha", 8))
    return alpha if isinstance(alpha, (int, float)) else None


def _scale(fields: Fields, path: str, rank: int) -> float | None:
    alpha = alpha_of(fields, path)
    if alpha is None or rank < 1:
        return None
    return alpha / math.sqrt(rank) if fields.get("use_rslora") else alpha / rank


def _pattern(fields: Fields, name: str) -> Mapping[str, object]:
    pattern = fields.get(name)
    return pattern if isinstance(pattern, dict) else {}


def _factors(fields: Fields, tensors: Mapping[str, Array]) -> Factors | None:
    # Of these A and B are the factors of something else: of each block, of averaged inputs, of each expert.
    if any(fields.get(name) for name in ("use_bdlora", "use_qalora", "target_parameters")):
        return None
    for down, up in (_LINEAR, _EMBEDDING):
        if down in tensors and up in tensors:
            a, b = tensors[down], tensors[up]
            # Of a convolution A has the kernel, and B is 1 x 1. Groups of channels have no such product.
            a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
            if b.shape[1] != len(a):
                return None
            if "lora_diag" in tensors:
                b = cast("Array", b * tensors["lora_diag"])
            return Factors(b, a)
    return None


def _remark(fields: Fields) -> str:
    if fields.get("use_dora"):
        return "DoRA's magnitudes, which scale the rows of the sum with the base's weight, are not in it"
    return ""


register_outline(PeftType.LORA, Outline((_LINEAR, _EMBEDDING), _planned, _rank, _scale, _factors, _remark))
