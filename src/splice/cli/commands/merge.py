"""`splice merge`: adapters merged into the files of their base, which is never loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from splice.cli.options import json_option, of_the_base
from splice.cli.output import console, print_json, shown
from splice.errors import sized

if TYPE_CHECKING:
    from splice.loading.on_disk.merging import Written

_DTYPES = ("bfloat16", "float16", "float32", "float64")


@click.command
@click.option("--base", required=True, help="Folder of the base model, or its id on the Hub.")
@click.option("--adapter", "adapters", required=True, multiple=True, help="An adapter's folder or id; may come again.")
@click.option("--weights", help="A factor for each adapter, in their order, with commas between: 0.7,0.3.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to be made.")
@click.option("--dtype", type=click.Choice(_DTYPES), help="Of the merged model; that of the base's files otherwise.")
@click.option("--safe", is_flag=True, help="Refuse merged values that are not finite.")
@of_the_base
@click.option("--revision", help="Branch, tag or commit of the adapters on the Hub.")
@json_option
def command(
    base: str,
    adapters: tuple[str, ...],
    weights: str | None,
    out: Path,
    dtype: str | None,
    safe: bool,
    base_revision: str | None,
    revision: str | None,
    class_name: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> int:
    """Merge adapters into the files of a base model.

    The model is never loaded: one layer at a time is read, merged and written, and what no adapter changes is copied. The
    new folder appears when it is complete. Cut short, the same command goes on where it stopped.
    """
    factors = None if weights is None else _factors(weights, len(adapters))
    # Imported when all arguments are known to be right: torch takes a second or two.
    torch, merging = import_module("torch"), import_module("splice.merging_files")
    with _bar(quiet=as_json or not sys.stderr.isatty()) as (begin, advance):
        written: Written = merging.merge_files(
            base,
            adapters,
            out,
            weights=factors,
            dtype=None if dtype is None else getattr(torch, dtype),
            safe_merge=safe,
            base_revision=base_revision,
            class_name=class_name,
            trust_remote_code=trust_remote_code,
            progress=merging.Progress(begin, advance),
            **({} if revision is None else {"revision": revision}),
        )
    if as_json:
        print_json(
            {"folder": str(out), "bytes": written.size, "changed_tensors": written.changed, "resumed": written.resumed}
        )
    else:
        kept = f", of which {len(written.resumed)} files were finished before" if written.resumed else ""
        console().print(f"{shown(str(out))}: {sized(written.size)}{kept}, {written.changed} tensors changed")
    return 0


def _factors(text: str, count: int) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--weights takes numbers with commas between, and got {text!r}") from None
    if len(found) != count:
        raise click.UsageError(f"--weights has {len(found)} numbers, and there are {count} adapters")
    return found


@contextmanager
def _bar(quiet: bool) -> Iterator[tuple[Callable[[int, int], object], Callable[[int], object]]]:
    """A bar on the terminal, with bytes, speed and the time that is left: what begins it, and what moves it."""
    if quiet:
        yield (lambda left, whole: None), (lambda count: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merging", total=None)

        def begin(left: int, whole: int) -> None:
            bar.update(task, total=whole, completed=whole - left)

        yield begin, partial(bar.advance, task)
