"""Files of adapters in whatever dialect: those of a folder, a file or a repository, and folders in the format's own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from splice.checkpoint.dialects import OWN, Dialect, Part, PathsOf, dialects
from splice.checkpoint.download import listing
from splice.checkpoint.fields import read_fields
from splice.checkpoint.foreign import foreign_names, what_config
from splice.checkpoint.format import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME
from splice.checkpoint.incoming import CONFIG_DIGEST
from splice.checkpoint.source import Source
from splice.checkpoint.tensors import open_weights
from splice.checkpoint.unread import unread_in, write_tensors
from splice.errors import CheckpointError, PeftError

_WEIGHTS = (".safetensors", ".bin", ".pt")


class Parts(NamedTuple):
    """What was found, and how it is written."""

    # One for each network.
    parts: tuple[Part, ...]
    # Name of the dialect.
    dialect: str
    # Where it is, for messages.
    place: str


def read_parts(
    adapter: str | os.PathLike[str], component: str | None, paths_of: PathsOf, options: Mapping[str, Any]
) -> Parts:
    """Find the files of an adapter and read their headers.

    Args:
        adapter: a folder, a file of weights, or an id of the Hub. A folder may hold an adapter of the format, folders of
            several that are named as their components, or one file of another program.
        component: the network that is meant; None for all of them.
        paths_of: the layers of the base, where there is one.
        options: of `PeftModel.from_pretrained`.

    Raises:
        CheckpointError: there is no adapter, or a damaged one.
        PeftError: nobody knows how it is written, or it has no such component.
    """
    found = _found(adapter, paths_of, options)
    if component is None:
        return found
    if len(found.parts) == 1 and found.parts[0].component in ("", component):
        return found._replace(parts=(found.parts[0]._replace(component=component),))
    chosen = tuple(part for part in found.parts if part.component == component)
    if not chosen:
        there = ", ".join(part.component for part in found.parts)
        raise PeftError(f"{found.place} has nothing for a component {component!r}; it has {there}")
    return found._replace(parts=chosen)


def _found(adapter: str | os.PathLike[str], paths_of: PathsOf, options: Mapping[str, Any]) -> Parts:
    path = Path(adapter)
    if path.is_file():
        if path.name in (SAFETENSORS_NAME, BIN_NAME) and (path.parent / CONFIG_NAME).exists():
            part = _own(Source(str(path.parent)), "")
            # The config beside it belongs to another file, where the names are another program's.
            if foreign_names(part.tensors) is None:
                return Parts((part,), OWN, str(adapter))
        return _of_another(path, paths_of)
    source = Source.from_options(adapter, options.get("subfolder"), options)
    if source.has(CONFIG_NAME):
        return Parts((_own(source, ""),), OWN, str(adapter))
    if source.is_local:
        return _in_folder(source, paths_of)
    names = [name for name in listing(source.location, source.options, source.commit) if name.endswith(_WEIGHTS)]
    files = [Path(name).name for name in names if str(Path(name).parent) == (source.subfolder or ".")]
    fetched = source.fetched(files[0]) if len(files) == 1 else None
    if fetched is None:
        source.config_text()  # says what there is in place of one
        raise CheckpointError(
            f"{adapter} has several files of weights: {', '.join(files)}; fetch the one that is meant"
        )
    return _of_another(fetched, paths_of)


def _in_folder(source: Source, paths_of: PathsOf) -> Parts:
    folder = source.folder
    below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}")) if folder.is_dir() else []
    if below:
        parts = tuple(_own(Source(str(folder / name)), name) for name in below)
        return Parts(parts, OWN, str(folder))
    files = sorted(path for path in folder.glob("*") if path.suffix in _WEIGHTS) if folder.is_dir() else []
    if len(files) != 1:
        source.config_text()  # says what there is in place of one
        raise CheckpointError(f"{folder} has several files of weights: name the one that is meant")
    return _of_another(files[0], paths_of)


def _own(source: Source, component: str) -> Part:
    fields = read_fields(source.config_text(), source.config_place)
    if "peft_type" not in fields:
        raise CheckpointError(
            f"{source.config_place} has no 'peft_type': it does not say which kind of adapter this is.{what_config(fields)}"
        )
    return Part(component, fields, unread_in(open_weights(Path(source.weights()))))


def _of_another(path: Path, paths_of: PathsOf) -> Parts:
    weights = open_weights(path)
    dialect = _dialect_of(list(weights.entries))
    if dialect is None or dialect.read is None:
        first = next(iter(weights.entries), "no tensor")
        known = ", ".join(name for name, each in dialects().items() if each.read is not None)
        raise PeftError(f"{path} ({first}) is in no dialect that is known here: {OWN}, with its {CONFIG_NAME}, {known}")
    return Parts(tuple(dialect.read(weights, paths_of)), dialect.name, str(path))


def _dialect_of(names: Sequence[str]) -> Dialect | None:
    readable = (each for each in dialects().values() if each.recognises is not None)
    return next((each for each in readable if each.recognises is not None and each.recognises(names)), None)


def write_own(parts: Sequence[Part], folder: Path) -> None:
    """Write adapters of the format into a folder that is not there yet; of several each into one inside, by its component."""
    for part in parts:
        own = folder / part.component if len(parts) > 1 else folder
        own.mkdir(parents=True)
        text = json.dumps(part.fields, indent=2, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        write_tensors(own / SAFETENSORS_NAME, part.tensors, {"format": "pt", CONFIG_DIGEST: digest})
        (own / CONFIG_NAME).write_text(text, encoding="utf-8")
