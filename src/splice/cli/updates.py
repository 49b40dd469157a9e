"""What adapters do to single layers: the norm, the singular values and the products of updates, from their factors alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from splice.checkpoint.outline import Array, Factors
from splice.checkpoint.values import Values
from splice.cli.layers import Layer
from splice.cli.summary import Summary


class Update(NamedTuple):
    """The update of one layer's weight."""

    # The layer.
    layer: Layer
    # Its factors, the left one scaled; None where they do not follow from the file alone.
    factors: Factors | None
    # The square root of the sum of the squares of the update or, where it is not known, of the layer's tensors.
    norm: float
    # Singular values of the update, the largest first; empty where it is not known.
    singular_values: tuple[float, ...]


def updates_of(summary: Summary) -> Iterator[Update]:
    """The updates of an adapter's own layers, in the order of its file; one layer's tensors are in memory at a time."""
    with Values(summary.opened.weights) as values:
        for layer in summary.layers:
            if is_readable(layer):
                yield _update(summary, layer, values)


def is_readable(layer: Layer) -> bool:
    """Whether it is the method's, and its values lie in the file as they are used."""
    return layer.own and all(entry.offset or not entry.size for entry in layer.entries.values())


def _update(summary: Summary, layer: Layer, values: Values) -> Update:
    tensors = {suffix: values.read(entry) for suffix, entry in layer.entries.items()}
    outline = summary.outline
    factors = outline.factors(summary.opened.fields, tensors) if outline and layer.scale is not None else None
    if factors is None:
        return Update(
            layer, None, float(np.sqrt(sum(np.square(t, dtype=np.float64).sum() for t in tensors.values()))), ()
        )
    factors = Factors(np.asarray(factors.left * np.float32(layer.scale or 0)), factors.right)
    found = singular_values(factors)
    return Update(layer, factors, float(np.sqrt(np.square(found).sum())), tuple(found.tolist()))


def singular_values(factors: Factors) -> Array:
    """Those of the product, the largest first, without making it; NaN where a factor has values that are no numbers."""
    left, right = (np.asarray(factor, dtype=np.float64) for factor in (factors.left, factors.right.T))
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return np.full(left.shape[1], np.nan, dtype=np.float32)
    small = np.linalg.qr(left).R @ np.linalg.qr(right).R.T
    return np.asarray(np.linalg.svd(small, compute_uv=False), dtype=np.float32)


def inner_product(one: Factors, other: Factors) -> float:
    """The sum of the products of two updates' values, without making them."""
    left = np.asarray(one.left, np.float64).T @ np.asarray(other.left, np.float64)
    right = np.asarray(one.right, np.float64) @ np.asarray(other.right, np.float64).T
    return float((left * right).sum())


def effective_rank(values: tuple[float, ...]) -> float:
    """How many directions an update has, counted by their weight: e to the entropy of the squared singular values' shares.

    Roy and Vetterli, "The effective rank", 2007, with squares in the place of values, so that it counts energy. 0 of nothing.
    """
    squares = np.square(np.asarray(values, dtype=np.float64))
    total = squares.sum()
    if not np.isfinite(total) or total == 0:
        return 0.0
    shares = squares[squares > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))
