"""AdaLoRA adapters as their files show them, without torch: rank, scale, and the factors of the update.

It is read without the method, since `splice inspect` needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from splice.checkpoint.outline import Array, Factors, Fields, Outline, Shapes, register_outline
from splice.checkpoint.types import PeftType

_A, _B, _E = "lora_A", "lora_B", "lora_E"


def _planned(fields: Fields, path: str) -> int | None:
    # Training gives up ranks, and the config says how many are left by the numbers of those that were kept.
    return None


def _rank(fields: Fields, path: str, shapes: Shapes) -> int | None:
    return shapes[_A][0] if shapes.get(_A) else None


def _scale(fields: Fields, path: str, rank: int) -> float | None:
    # By the rank at the start of training, whatever is left of it.
    alpha, start = fields.get("lora_alpha", 8), fields.get("init_r", 12)
    if not isinstance(alpha, (int, float)) or not isinstance(start, int) or start < 1:
        return None
    return (alpha if alpha > 0 else start) / (start + 1e-5)


def _factors(fields: Fields, tensors: Mapping[str, Array]) -> Factors | None:
    if not {_A, _B, _E} <= tensors.keys():
        return None
    a, b, e = tensors[_A], tensors[_B], tensors[_E].reshape(-1)
    if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == len(e):
        return None
    return Factors(cast("Array", b * e), a)


def _remark(fields: Fields) -> str:
    return ""


register_outline(PeftType.ADALORA, Outline(((_A, _B, _E),), _planned, _rank, _scale, _factors, _remark))
