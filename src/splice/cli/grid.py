"""The layers of an adapter as a grid: blocks of the base down, modules across."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from splice.cli.updates import Update

# The row of layers that are in no block.
_OUTSIDE = ""


class Grid(NamedTuple):
    """Updates by block and module."""

    # Names of the blocks: their numbers, behind the list that these count in where there are several lists.
    rows: tuple[str, ...]
    # Names of modules inside of a block.
    columns: tuple[str, ...]
    # (row, column) -> the update there; a block need not have every module.
    cells: Mapping[tuple[str, str], Update]
    # Whether the norms are those of updates; of some methods they are those of their tensors.
    of_updates: bool

    @property
    def meaning(self) -> str:
        """What the norm of a cell is of."""
        return "norm of the update" if self.of_updates else "norm of the adapter's tensors"


def grid_of(updates: Iterable[Update]) -> Grid:
    """Put updates into a grid: rows in the order of their numbers, columns in the order in which they come."""
    placed = [(*_place(update.layer.path), update) for update in updates]
    fronts = {front for front, number, _, _ in placed if number is not None}

    def row(front: str, number: int | None) -> str:
        return _OUTSIDE if number is None else str(number) if len(fronts) == 1 else f"{front}.{number}"

    order = sorted({(front, number) for front, number, _, _ in placed if number is not None})
    outside = [_OUTSIDE] if any(number is None for _, number, _, _ in placed) else []
    return Grid(
        rows=tuple([row(front, number) for front, number in order] + outside),
        columns=tuple(dict.fromkeys(column for _, _, column, _ in placed)),
        cells={(row(front, number), column): update for front, number, column, update in placed},
        of_updates=all(update.factors is not None for *_, update in placed),
    )


def _place(path: str) -> tuple[str, int | None, str]:
    """(the list of blocks, the number in it, the module inside of the block) of a path."""
    found = re.fullmatch(r"(?:(.*?)\.)?(\d+)(?:\.(.*))?", path)
    if found is None:
        return "", None, path or "the whole network"
    return found[1] or "", int(found[2]), found[3] or "the block"
