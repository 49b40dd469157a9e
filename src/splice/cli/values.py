"""What the values of an adapter's tensors tell: whether they are numbers, and whether they do anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from splice.checkpoint.header import Entry
from splice.checkpoint.values import Values
from splice.cli.problems import Problem, listed
from splice.cli.summary import Summary
from splice.errors import counted


class Found(NamedTuple):
    """What one tensor holds."""

    # How many of its values are no numbers, or infinite.
    not_finite: int
    # The largest of the others, without its sign; 0 of a tensor that is zero throughout.
    largest: float
    # The square root of the sum of their squares.
    norm: float


def looked_at(values: Values, entry: Entry) -> Found:
    """Look at every value of a tensor once."""
    not_finite, largest, squares = 0, 0.0, 0.0
    for piece in values.pieces(entry):
        piece = np.asarray(piece, dtype=np.float64)
        finite = np.isfinite(piece)
        if not finite.all():
            not_finite += int(np.count_nonzero(~finite))
            piece = piece[finite]
        if piece.size:
            largest = max(largest, float(np.abs(piece).max()))
            squares += float(np.dot(piece, piece))
    return Found(not_finite, largest, squares**0.5)


def problems_of_values(summary: Summary) -> Iterator[Problem]:
    """What is wrong with the values of an adapter's tensors; all of them are read."""
    entries = {name: entry for name, entry in summary.opened.header.entries.items() if not _elsewhere(entry)}
    if len(entries) < len(summary.opened.header.entries):
        yield Problem(
            "the values of some tensors lie in an order that only torch reads; they were not looked at.", False
        )
    with Values(summary.opened.weights) as values:
        found = {name: looked_at(values, entry) for name, entry in entries.items()}
    broken = [f"{name} ({counted(of.not_finite, 'value')})" for name, of in found.items() if of.not_finite]
    if broken:
        yield Problem(f"{counted(len(broken), 'tensor')} with values that are NaN or infinite: {listed(broken)}.")
    idle = [
        layer.path
        for layer in summary.layers
        if layer.own
        and summary.outline
        and any(name in found and found[name].largest == 0 for name in layer.names.values())
    ]
    if idle:
        share = "all" if len(idle) == sum(layer.own for layer in summary.layers) else str(len(idle))
        yield Problem(f"{share} layers have a tensor that is zero, and so change nothing: {listed(idle)}.")
    elif not summary.outline:
        zero = [name for name, of in found.items() if of.largest == 0 and entries[name].size]
        if zero:
            yield Problem(f"{counted(len(zero), 'tensor')} zero throughout: {listed(zero)}.", False)


def _elsewhere(entry: Entry) -> bool:
    return entry.offset == 0
