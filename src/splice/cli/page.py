"""The report on an adapter: one page of HTML that needs nothing else, neither files nor a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from splice import __version__
from splice.cli.grid import Grid
from splice.cli.output import number
from splice.cli.problems import Problem
from splice.cli.summary import Summary
from splice.cli.updates import Update, effective_rank

# Pixels of a cell of the map, of the letters of a label, and of the bars that show singular values.
_CELL, _LETTER = 22, 6.3
_BARS_WIDE, _BARS_HIGH, _BARS = 120, 18, 60
# Pixels of the strip that explains the colours.
_LEGEND = 120
_HEADINGS = ("layer", "rank", "scale", "norm", "largest singular value", "effective rank", "singular values")
# Viridis, from little to much.
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_NO_NUMBER = "#b3261e"


def page_of(summary: Summary, facts: Iterable[tuple[str, str]], grid: Grid, updates: Sequence[Update]) -> str:
    """The page.

    Args:
        summary: of the adapter.
        facts: (title, text) of what stands at the top.
        grid: its updates by block and module.
        updates: the same in the order of the file.
    """
    remark = summary.outline.remark(summary.opened.fields) if summary.outline else ""
    meaning = f"Blocks of the base down, modules across; the colour is the {grid.meaning}."
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escape(summary.opened.place),
        about=escape(f"An adapter of {len(updates)} layers, of the method {summary.opened.fields['peft_type']}."),
        problems="\n".join(_problem(problem) for problem in summary.problems)
        or '<li class="fine">No problems found.</li>',
        facts="\n".join(f"<dt>{escape(title)}</dt><dd>{escape(text)}</dd>" for title, text in facts),
        meaning=escape(meaning + (f" Note: {remark}." if remark else "")),
        map=_map(grid),
        headings="".join(f'<th><button type="button">{heading}</button></th>' for heading in _HEADINGS),
        rows="\n".join(_row(update) for update in updates),
        version=__version__,
    )


def _problem(problem: Problem) -> str:
    kind = "problem" if problem.serious else "note"
    return f'<li class="{kind}"><b>{kind}</b> {escape(problem.text)}</li>'


def _map(grid: Grid) -> str:
    """The heat map as SVG."""
    left = 12 + _LETTER * max((len(name) for name in grid.rows), default=0) + 40
    top = 12 + _LETTER * max((len(name) for name in grid.columns), default=0)
    wide, high = left + max(_CELL * len(grid.columns), _LEGEND + 60) + 8, top + _CELL * len(grid.rows) + 12
    largest = max((u.norm for u in grid.cells.values() if math.isfinite(u.norm)), default=0)
    parts = [f'<svg width="{wide:.0f}" height="{high + 20:.0f}" role="img" aria-label="{escape(grid.meaning)}">']
    for i, name in enumerate(grid.columns):
        at = left + _CELL * (i + 0.65)
        parts.append(f'<text transform="translate({at:.1f} {top - 6:.1f}) rotate(-90)">{escape(name)}</text>')
    for i, name in enumerate(grid.rows):
        at = top + _CELL * (i + 0.68)
        parts.append(f'<text x="{left - 8:.1f}" y="{at:.1f}" text-anchor="end">{escape(name or "outside")}</text>')
    for (row, column), update in grid.cells.items():
        x, y = left + _CELL * grid.columns.index(column), top + _CELL * grid.rows.index(row)
        parts.append(
            f'<rect class="cell" tabindex="0" x="{x:.1f}" y="{y:.1f}" width="{_CELL}" height="{_CELL}" '
            f'fill="{_colour(update.norm, largest)}" data-tip="{escape(_tip(update, grid))}"/>'
        )
    return "".join([*parts, _legend(left, high, largest), "</svg>"])


def _legend(left: float, top: float, largest: float) -> str:
    """What the colours mean: a strip from nothing to the largest norm."""
    stops = "".join(
        f'<stop offset="{i / (len(_COLOURS) - 1):.2f}" stop-color="rgb{colour}"/>' for i, colour in enumerate(_COLOURS)
    )
    end = left + _LEGEND + 6
    return (
        f'<defs><linearGradient id="scale">{stops}</linearGradient></defs>'
        f'<text x="{left - 8:.1f}" y="{top + 11:.1f}" text-anchor="end">0</text>'
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{_LEGEND}" height="12" fill="url(#scale)"/>'
        f'<text x="{end:.1f}" y="{top + 11:.1f}">{_number(largest)}</text>'
    )


def _colour(norm: float, largest: float) -> str:
    if not math.isfinite(norm):
        return _NO_NUMBER
    place = (norm / largest if largest else 0) * (len(_COLOURS) - 1)
    low = min(int(place), len(_COLOURS) - 2)
    mixed = (a + (b - a) * (place - low) for a, b in zip(_COLOURS[low], _COLOURS[low + 1]))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def _tip(update: Update, grid: Grid) -> str:
    lines = [update.layer.path or "the whole network", f"{grid.meaning}: {_number(update.norm)}"]
    if update.singular_values:
        lines.append(f"effective rank: {effective_rank(update.singular_values):.2f} of {len(update.singular_values)}")
    return "\n".join(lines)


def _row(update: Update) -> str:
    layer, values = update.layer, update.singular_values
    path = layer.path or "the whole network"
    rank = effective_rank(values) if values else None
    numbers = (layer.rank, layer.scale, update.norm, values[0] if values else None, rank)
    cells = [f'<td data-value="{escape(path)}">{escape(path)}</td>']
    cells += [
        f'<td data-value="{_sortable(value)}">{"" if value is None else _number(value)}</td>' for value in numbers
    ]
    cells.append(f'<td data-value="{_sortable(rank)}">{_bars(values)}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _sortable(value: float | None) -> str:
    return repr(float(value)) if value is not None and math.isfinite(value) else "-1"


def _number(value: float) -> str:
    return number(value) if math.isfinite(value) else "not a number"


def _bars(values: Sequence[float]) -> str:
    """Singular values as bars, the largest first; their number stands in the title."""
    if not values or not math.isfinite(values[0]) or not values[0]:
        return ""
    shown = values[:_BARS]
    wide = _BARS_WIDE / len(shown)
    bars = (
        f'<rect x="{wide * i:.2f}" y="{_BARS_HIGH * (1 - value / values[0]):.2f}" width="{max(wide - 1, 0.8):.2f}" '
        f'height="{max(_BARS_HIGH * value / values[0], 0.4):.2f}"/>'
        for i, value in enumerate(shown)
    )
    title = escape(", ".join(f"{value:.3g}" for value in shown))
    return f'<svg width="{_BARS_WIDE}" height="{_BARS_HIGH}"><title>{title}</title>{"".join(bars)}</svg>'
