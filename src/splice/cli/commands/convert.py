"""`splice convert`: an adapter written as one of another method."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from splice.cli.options import json_option, of_the_base, of_the_hub
from splice.cli.output import console, number, print_json, shown
from splice.errors import counted

if TYPE_CHECKING:
    from splice.converting_files import Converted

# Layers that are shown to people: those with the largest errors.
_SHOWN = 10


@click.command
@click.argument("adapter")
@click.option("--to", "method", help="The method of the new adapter; there is one so far.")
@click.option("--base", required=True, help="Folder of the base model, or its id on the Hub; a config alone may do.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to be made.")
@click.option("--rank", help="Of every layer, or `auto`: as small as the error allows.")
@click.option(
    "--error", type=float, help="The largest error of a layer's update, relative to its norm; 0.01 by default."
)
@of_the_base
@of_the_hub
@json_option
def command(
    adapter: str,
    method: str | None,
    base: str,
    out: Path,
    rank: str | None,
    error: float | None,
    base_revision: str | None,
    class_name: str | None,
    trust_remote_code: bool,
    subfolder: str | None,
    revision: str | None,
    as_json: bool,
) -> int:
    """Write an adapter as one of another method, for programs that take only that one.

    What the adapter changes each weight by is cut off after its largest singular values, and the error that this makes is
    told for each layer. The base is not loaded: a weight is read only where the update depends on it.
    """
    of_all = _rank(rank)
    given = {"subfolder": subfolder, "revision": revision}
    converting = import_module("splice.converting_files")
    with _bar(quiet=as_json or not sys.stderr.isatty()) as advance:
        converted: Converted = converting.convert_files(
            adapter,
            base,
            out,
            None if method is None else method.upper(),
            rank=of_all,
            error=error,
            base_revision=base_revision,
            class_name=class_name,
            trust_remote_code=trust_remote_code,
            advance=advance,
            **{name: value for name, value in given.items() if value is not None},
        )
    if as_json:
        rows = [
            {"path": each.path, "rank": each.rank, "norm": each.norm, "error": each.error} for each in converted.layers
        ]
        print_json({"folder": str(out), "largest_error": converted.largest_error, "layers": rows})
    else:
        _show(converted)
    return 0


def _rank(text: str | None) -> int | None:
    if text is None or text == "auto":
        return None
    if not text.isdecimal():
        raise click.UsageError(f"--rank takes a number or `auto`, and got {text!r}")
    return int(text)


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[int, int], object] | None]:
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("converting")
        yield lambda done, whole: bar.update(task, completed=done, total=whole)


def _show(converted: Converted) -> None:
    from rich.table import Table

    out = console()
    ranks = sorted({layer.rank for layer in converted.layers})
    spelled = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    of = counted(len(converted.layers), "layer", "layers")
    out.print(f"{shown(str(converted.folder))}: {of}, rank {spelled}, largest error {number(converted.largest_error)}")
    table = Table(box=None, pad_edge=False)
    for title in ("layer", "rank", "norm of the update", "relative error"):
        table.add_column(title, justify="left" if title == "layer" else "right", no_wrap=True)
    worst = sorted(converted.layers, key=lambda layer: -layer.error)
    for layer in worst[:_SHOWN]:
        table.add_row(shown(layer.path), str(layer.rank), number(layer.norm), number(layer.error))
    out.print(table)
    if len(worst) > _SHOWN:
        out.print(f"and {len(worst) - _SHOWN} with smaller errors; --json has all of them")
