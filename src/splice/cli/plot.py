"""The heat map of an adapter as a picture, drawn by matplotlib."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from splice.cli.grid import Grid

# Endings of the files that can be drawn.
FORMATS = (".png", ".svg")
# Inches of a cell, and of what is around the cells.
_CELL, _LEFT, _TOP = 0.24, 2.4, 2.2
# Above so many cells across or down, not every one is labelled.
_LABELS = 80


def check_plot(path: Path) -> None:
    """Raise where no plot can be written to `path`, before anything is read.

    Raises:
        ValueError: with what to do.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a plot is a file of {' or '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise ValueError("a plot is drawn by matplotlib: pip install 'splice[plots]'")


def write_plot(grid: Grid, title: str, path: Path) -> None:
    """Draw the norms of a grid, layers down and modules across, into a file of one of the `FORMATS`."""
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    norms = np.full((len(grid.rows), len(grid.columns)), np.nan)
    for (row, column), update in grid.cells.items():
        norms[grid.rows.index(row), grid.columns.index(column)] = update.norm
    # Not by `pyplot`, which keeps every figure and looks for a screen.
    figure = Figure(figsize=(_LEFT + _CELL * len(grid.columns), _TOP + _CELL * len(grid.rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(norms), aspect="auto", cmap="viridis", vmin=0)
    for set_ticks, names, turned in ((axes.set_xticks, grid.columns, 90), (axes.set_yticks, grid.rows, 0)):
        step = -(-len(names) // _LABELS) or 1
        set_ticks(range(0, len(names), step), [n or "outside" for n in names[::step]], fontsize=7, rotation=turned)
    axes.set_title(title, fontsize=8)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(grid.meaning, fontsize=7)
    bar.ax.tick_params(labelsize=7)
    # Without the date and with names that are not drawn by lot, so that the same adapter is the same file.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
    with rc_context({"svg.hashsalt": "splice"}):
        figure.savefig(path, dpi=160, metadata=metadata)
