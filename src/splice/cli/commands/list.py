"""`splice list`: every adapter below a folder or in the Hub's cache, one line each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

from splice.checkpoint.format import CONFIG_NAME
from splice.cli.opened import open_adapter
from splice.cli.options import json_option
from splice.cli.output import console, number, print_json, shown
from splice.cli.summary import Summary, look_into
from splice.errors import CheckpointError, sized


class _Line(NamedTuple):
    """One adapter of the list."""

    # Its folder, or the id of its repository and what is behind that.
    name: str
    # Its folder.
    folder: Path
    # What it is; None where it cannot be read.
    summary: Summary | None
    # Why not; "" where it can be.
    error: str


@click.command
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
def command(folder: Path | None, as_json: bool) -> int:
    """List the adapters below a folder, or in the Hub's cache.

    Without FOLDER it is the cache. Folders that links lead to are passed over.
    """
    lines = [_line(name, path) for name, path in (_in_cache() if folder is None else _below(folder))]
    if as_json:
        print_json([_as_json(line) for line in lines])
    else:
        _show(lines, folder)
    return 0 if all(line.summary is not None for line in lines) else 1


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, folder) of every adapter, in the order of their names."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        if CONFIG_NAME in files:
            yield place, Path(place)


def _in_cache() -> Iterator[tuple[str, Path]]:
    # It takes a tenth of a second to import, and says where the cache is: by several variables of the environment.
    from huggingface_hub import constants

    for repository in sorted(Path(constants.HF_HUB_CACHE).glob("models--*")):
        identity = repository.name.removeprefix("models--").replace("--", "/")
        for snapshot in sorted(repository.glob("snapshots/*")):
            for _, folder in _below(snapshot):
                inside = folder.relative_to(snapshot).as_posix()
                yield f"{identity}@{snapshot.name[:7]}{'' if inside == '.' else f' {inside}'}", folder


def _line(name: str, folder: Path) -> _Line:
    try:
        return _Line(name, folder, look_into(open_adapter(str(folder))), "")
    except (CheckpointError, OSError, ValueError) as error:
        return _Line(name, folder, None, str(error))


def _ranks(summary: Summary) -> list[int]:
    return sorted({layer.rank for layer in summary.layers if layer.rank is not None})


def _as_json(line: _Line) -> dict[str, object]:
    summary = line.summary
    if summary is None:
        return {"name": line.name, "folder": str(line.folder), "error": line.error}
    return {
        "name": line.name,
        "folder": str(line.folder),
        "method": summary.opened.fields["peft_type"],
        "ranks": _ranks(summary),
        "parameters": summary.parameters,
        "bytes": summary.nbytes,
        "base": summary.opened.fields.get("base_model_name_or_path"),
        "problems": [problem.text for problem in summary.problems if problem.serious],
    }


def _show(lines: list[_Line], folder: Path | None) -> None:
    from rich.table import Table

    out = console()
    if not lines:
        out.print(f"no adapters {'in the cache' if folder is None else f'below {shown(str(folder))}'}")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("adapter", "method", "rank", "parameters", "size", "base", ""):
        number_like = title in ("rank", "parameters", "size")
        # On a narrow terminal names go on below; they are what the next command is called with.
        table.add_column(title, justify="right" if number_like else "left", no_wrap=number_like, overflow="fold")
    for line in lines:
        summary = line.summary
        if summary is None:
            table.add_row(shown(line.name), "", "", "", "", "", f"cannot be read: {shown(line.error)}")
            continue
        fields, serious = summary.opened.fields, [problem.text for problem in summary.problems if problem.serious]
        table.add_row(
            shown(line.name),
            shown(str(fields["peft_type"])),
            ",".join(map(str, _ranks(summary))),
            number(summary.parameters),
            sized(summary.nbytes),
            shown(str(fields.get("base_model_name_or_path") or "")),
            shown(serious[0]) if serious else "",
        )
    out.print(table, soft_wrap=False)
