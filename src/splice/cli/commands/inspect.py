"""`splice inspect`: what an adapter is, without its base, without torch, and without reading more than it has to."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import click

from splice.checkpoint.files import write_text
from splice.cli.grid import grid_of
from splice.cli.layers import Group, grouped
from splice.cli.opened import open_adapter
from splice.cli.options import json_option, of_the_hub
from splice.cli.output import console, number, print_json, shown
from splice.cli.page import page_of
from splice.cli.plot import check_plot, write_plot
from splice.cli.summary import Summary, fingerprint, look_into, written_by
from splice.cli.trees import tree
from splice.cli.updates import updates_of
from splice.cli.values import problems_of_values
from splice.errors import counted, sized

if TYPE_CHECKING:
    from rich.tree import Tree

_FILE = click.Path(dir_okay=False, path_type=Path)
# Characters of an option's value that one line shows.
_LONG = 60
# Columns before what is said of a checkpoint.
_INDENT = 14


@click.command
@click.argument("adapter")
@of_the_hub
@click.option("--values", is_flag=True, help="Read all values, and look for those that are wrong.")
@click.option("--plot", type=_FILE, help="Draw what it changes where as a heat map, into a file of .png or .svg.")
@click.option("--report", type=_FILE, help="Write one page of HTML with the map, singular values and problems.")
@json_option
def command(
    adapter: str,
    subfolder: str | None,
    revision: str | None,
    values: bool,
    plot: Path | None,
    report: Path | None,
    as_json: bool,
) -> int:
    """Show what an adapter is, and what is wrong with it.

    ADAPTER is a folder, the file of its weights, or an id of the Hub. Its base is not needed.
    """
    if plot is not None:
        check_plot(plot)
    summary = look_into(open_adapter(adapter, subfolder, revision))
    # A report has the problems on top: whoever reads it should not have to ask once more.
    if values or report is not None:
        summary = summary._replace(problems=(*summary.problems, *problems_of_values(summary)))
    if plot is not None or report is not None:
        _draw(summary, plot, report)
    if as_json:
        print_json(summary.as_json())
    else:
        _show(summary, values or report is not None)
    return 0 if summary.is_sound else 1


def _draw(summary: Summary, plot: Path | None, report: Path | None) -> None:
    """Write the files that were asked for."""
    updates = list(updates_of(summary))
    grid = grid_of(updates)
    if plot is not None:
        write_plot(grid, summary.opened.place, plot)
    if report is not None:
        # In one step: a report that is looked at is not half of the next one.
        write_text(report, page_of(summary, _facts(summary), grid, updates))


def _show(summary: Summary, values: bool) -> None:
    from rich.text import Text

    out = console()
    out.print(shown(summary.opened.place), style="bold")
    for title, text in _facts(summary):
        # Below itself where the terminal is too narrow for a line.
        lines = wrap(shown(text), max(out.width - _INDENT, _INDENT), break_long_words=False, break_on_hyphens=False)
        out.print(Text.assemble((f"  {title:<11} ", "cyan"), f"\n{' ' * _INDENT}".join(lines)))
    out.print(_tree(summary))
    for problem in summary.problems:
        out.print(
            f"{'problem' if problem.serious else 'note'}: {shown(problem.text)}", style="red" if problem.serious else ""
        )
    if not summary.problems:
        out.print("no problems found" + ("" if values else "; --values reads the values too"), style="green")


def _facts(summary: Summary) -> list[tuple[str, str]]:
    fields, opened = summary.opened.fields, summary.opened
    about = f": {summary.method.summary}" if summary.method else ""
    task = f", for {fields['task_type']}" if fields.get("task_type") else ""
    revision = f" at {fields['revision']}" if fields.get("revision") else ""
    base = fields.get("base_model_name_or_path") or "not named"
    dtypes = ", ".join(summary.dtypes)
    tensors = counted(len(opened.header.entries), "tensor")
    facts = [
        ("method", f"{fields['peft_type']}{about}"),
        ("base", f"{base}{revision}{task}"),
        ("parameters", f"{number(summary.parameters)} in {dtypes or 'no tensor'}"),
        ("file", f"{opened.weights.name}, {sized(opened.weights.stat().st_size)}, {tensors}"),
    ]
    if summary.options:
        facts.append(("options", ", ".join(f"{name}={_short(value)}" for name, value in summary.options.items())))
    saved, versions = fingerprint(opened), written_by(opened)
    if versions:
        facts.append(("written by", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if saved:
        stored = f", stored as {saved['quantization']}" if saved["quantization"] else ""
        facts.append(("fingerprint", f"of a {saved['architecture']}, {saved['count']} targets{stored}"))
    return facts


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


def _tree(summary: Summary) -> Tree:
    """The layers as a tree, with those that are alike on one line."""
    layers = {layer.path for layer in summary.layers}
    title = counted(len(layers), "layer") if any(layers) else "the whole network"
    return tree(title, [(group.path, _said(group)) for group in grouped(summary.layers)])


def _said(group: Group) -> str:
    first, count = group.layers[0], len(group.layers)
    told = [] if first.rank is None else [f"rank {first.rank}"]
    told += [] if first.scale is None else [f"scale {number(first.scale)}"]
    shapes = [f"{suffix} {tuple(shape)}" for suffix, shape in first.shapes.items()]
    text = ", ".join(told if first.rank is not None else [*told, *shapes])
    kind = "" if first.own else " (of the base)"
    return f"{text}{kind}  {f'{count} x ' if count > 1 else ''}{number(first.parameters)} parameters"
