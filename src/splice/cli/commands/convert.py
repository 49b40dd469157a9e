"""`splice convert`: an adapter written as one of another method, or as another program writes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
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
    from splice.translating_files import Translated

# The dialects, as help shows them; asking for them would import torch.
_DIALECTS = ("peft", "kohya", "diffusers", "gguf")
# Layers that are shown to people: those with the largest errors.
_SHOWN = 10


@click.command(short_help="Write an adapter as one of another method.")
@click.argument("adapter")
@click.option("--to", help=f"A method, of which there is one so far, or the form of a program: {', '.join(_DIALECTS)}.")
@click.option("--base", help="Folder of the base model, or its id on the Hub; a config alone may do.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder or the file to be made.")
@click.option("--rank", help="Of every layer, or `auto`: as small as the error allows.")
@click.option(
    "--error", type=float, help="The largest error of a layer's update, relative to its norm; 0.01 by default."
)
@click.option(
    "--rename",
    "renames",
    multiple=True,
    metavar="OLD=NEW",
    help="A regular expression for paths of modules; may be repeated.",
)
@click.option("--component", help="The network of a pipeline that is meant: unet, transformer, text_encoder...")
@of_the_base
@of_the_hub
@json_option
def command(
    adapter: str,
    to: str | None,
    base: str | None,
    out: Path,
    rank: str | None,
    error: float | None,
    renames: tuple[str, ...],
    component: str | None,
    base_revision: str | None,
    class_name: str | None,
    trust_remote_code: bool,
    subfolder: str | None,
    revision: str | None,
    as_json: bool,
) -> int:
    """Write an adapter as one of another method, or in the form of another program.

    As another method: what the adapter changes each weight by is cut off after its largest singular values, and the error
    that this makes is told for each layer. The base is not loaded: a weight is read only where the update depends on it.

    In the form of another program, or with other names (--rename, or those of --base): the adapter stays what it is. ADAPTER
    may be in any of these forms but gguf.
    """
    given = {"subfolder": subfolder, "revision": revision}
    if to in _DIALECTS or renames or component:
        if to not in (None, *_DIALECTS) or rank is not None or error is not None:
            raise click.UsageError(
                "--rename and --component are for the forms of programs, --rank and --error for methods"
            )
        translating = import_module("splice.translating_files")
        translated: Translated = translating.translate_files(
            adapter,
            out,
            to or _DIALECTS[0],
            base=base,
            rename=_renames(renames),
            component=component,
            base_revision=base_revision,
            class_name=class_name,
            trust_remote_code=trust_remote_code,
            **{name: value for name, value in given.items() if value is not None},
        )
        _tell(translated, as_json)
        return 0
    if base is None:
        raise click.UsageError("Say what the adapter is for: --base.")
    if Path(adapter).is_file():
        raise click.UsageError(f"{adapter} is a file: write it as a folder first, with --to {_DIALECTS[0]}")
    of_all = _rank(rank)
    converting = import_module("splice.converting_files")
    with _bar(quiet=as_json or not sys.stderr.isatty()) as advance:
        converted: Converted = converting.convert_files(
            adapter,
            base,
            out,
            None if to is None else to.upper(),
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


def _renames(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in given:
        # The last one: expressions may hold others.
        old, sign, new = text.rpartition("=")
        if not sign or not old:
            raise click.UsageError(f"--rename takes OLD=NEW, and got {text!r}")
        found[old] = new
    return found


def _tell(translated: Translated, as_json: bool) -> None:
    if as_json:
        print_json(
            {**translated._asdict(), "place": str(translated.place), "parts": [p._asdict() for p in translated.parts]}
        )
        return
    out = console()
    out.print(f"{shown(str(translated.place))}: {translated.dialect}, was {translated.read_as}")
    for part in translated.parts:
        front = f"{part.component}: " if part.component else ""
        out.print(f"  {shown(front)}{counted(part.layers, 'layer')}, {counted(part.tensors, 'tensor')}")
    for note in translated.notes:
        out.print(f"note: {shown(note)}")


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
