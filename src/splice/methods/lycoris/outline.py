"""LoHa and LoKr adapters as their files show them, without torch: rank, scale, and their updates as products.

They are read without the methods, since `splice inspect` needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from splice.checkpoint.outline import Array, Factors, Fields, Outline, Shapes, register_outline
from splice.checkpoint.patterns import value_for
from splice.checkpoint.types import PeftType

_HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_KRONECKER = (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"))


def _value(fields: Fields, pattern: str, path: str, field: str) -> object:
    given = fields.get(pattern)
    return value_for(given if isinstance(given, dict) else {}, path, fields.get(field, 8))


def _planned(fields: Fields, path: str) -> int | None:
    rank = _value(fields, "rank_pattern", path, "r")
    return rank if isinstance(rank, int) else None


def _scale(fields: Fields, path: str, rank: int) -> float | None:
    # By the config's rank: of a layer whose factors are small, no tensor has it.
    alpha = _value(fields, "alpha_pattern", path, "alpha")
    return alpha / rank if isinstance(alpha, (int, float)) and rank > 0 else None


def _remark(fields: Fields) -> str:
    return ""


def _hadamard_rank(fields: Fields, path: str, shapes: Shapes) -> int | None:
    return shapes["hada_w1_b"][0] if shapes.get("hada_w1_b") else None


def _kronecker_rank(fields: Fields, path: str, shapes: Shapes) -> int | None:
    found = [shapes[b][0] for _, b in _KRONECKER if shapes.get(b)]
    return found[0] if found else _planned(fields, path)


def _hadamard(fields: Fields, tensors: Mapping[str, Array]) -> Factors | None:
    """(W1a W1b) * (W2a W2b) as one product: its factors have a column, and a row, for each pair of those of the two."""
    if not set(_HADAMARD) <= tensors.keys() or "hada_t1" in tensors:
        return None
    a1, b1, a2, b2 = (tensors[name] for name in _HADAMARD)
    shapes = {(one.ndim, one.shape) for one in (a1, a2)}, {(one.ndim, one.shape) for one in (b1, b2)}
    if any(len(each) > 1 for each in shapes) or not a1.ndim == b1.ndim == 2 or a1.shape[1] != len(b1):
        return None
    pairs = len(b1) ** 2
    if pairs > min(len(a1), b1.shape[1]):  # it takes longer than the matrix itself
        return None
    left = (a1[:, :, None] * a2[:, None, :]).reshape(len(a1), pairs)
    right = (b1[:, None, :] * b2[None, :, :]).reshape(pairs, b1.shape[1])
    return Factors(left, right)


def _kronecker(fields: Fields, tensors: Mapping[str, Array]) -> Factors | None:
    """The Kronecker product of two products, as the product of the Kronecker products of their factors."""
    if "lokr_t2" in tensors or getattr(tensors.get("lokr_w2"), "ndim", 0) == 3:
        return None
    np: Any = import_module("numpy")
    first, second = (_pair(tensors, name, np) for name in ("lokr_w1", "lokr_w2"))
    if first is None or second is None:
        return None
    rows, columns = len(first.left) * len(second.left), first.right.shape[1] * second.right.shape[1]
    inner = len(first.right) * len(second.right)
    if inner > max(_SMALL, min(rows, columns) // 2):
        return None
    left, right = np.kron(first.left, second.left), np.kron(first.right, second.right)
    return Factors(cast("Array", left), cast("Array", right))


# Columns of a factor up to which its size does not matter.
_SMALL = 256


def _pair(tensors: Mapping[str, Array], name: str, np: Any) -> Factors | None:
    """One side of the product as two factors: one that is whole is itself times ones on a diagonal."""
    whole = tensors.get(name)
    if whole is not None:
        whole = whole.reshape(len(whole), -1)
        return Factors(whole, np.eye(whole.shape[1], dtype=np.float32))
    a, b = tensors.get(f"{name}_a"), tensors.get(f"{name}_b")
    if a is None or b is None or not a.ndim == b.ndim == 2 or a.shape[1] != len(b):
        return None
    return Factors(a, b)


register_outline(PeftType.LOHA, Outline((_HADAMARD,), _planned, _hadamard_rank, _scale, _hadamard, _remark))
register_outline(PeftType.LOKR, Outline(_KRONECKER, _planned, _kronecker_rank, _scale, _kronecker, _remark))
