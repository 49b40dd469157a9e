"""A checkpoint, opened and not read: the fields of its config and the names, dtypes and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from splice.checkpoint.fields import read_fields
from splice.checkpoint.foreign import foreign_names, what_config
from splice.checkpoint.format import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME
from splice.checkpoint.header import Header, read_header
from splice.checkpoint.incoming import finished_config
from splice.checkpoint.pickled import read_pickled
from splice.checkpoint.source import Source
from splice.errors import CheckpointError


class Opened(NamedTuple):
    """A checkpoint whose header was read."""

    # The folder, file or Hub id, as it was given.
    place: str
    # The file of its tensors.
    weights: Path
    # What its config says.
    fields: Mapping[str, object]
    # Its tensors.
    header: Header
    # Names that a pickle asks for besides those of tensors; None where the file is none.
    asks_for: tuple[str, ...] | None
    # The commit, where it is of the Hub.
    commit: str | None


def open_adapter(place: str, subfolder: str | None = None, revision: str | None = None) -> Opened:
    """Find a checkpoint and read what it consists of.

    Args:
        place: a folder, a Hub id, or the file of the weights, whose config lies beside it.
        subfolder: a folder inside of it.
        revision: of the repository on the Hub.

    Raises:
        CheckpointError: it cannot be found or read, or is no adapter of this format.
    """
    if Path(place).is_file():
        weights, text, where = _beside(Path(place))
        return _opened(place, weights, _fields(text, where), None)
    source = Source.from_options(place, subfolder, {"revision": revision})
    fields = _fields(source.config_text(), source.config_place)
    return _opened(place, Path(source.weights()), fields, source.commit)


def _fields(text: bytes, where: str) -> Mapping[str, object]:
    fields = read_fields(text, where)
    if "peft_type" not in fields:
        raise CheckpointError(
            f"{where} has no 'peft_type': it does not say which kind of adapter this is.{what_config(fields)}"
        )
    return fields


def _opened(place: str, weights: Path, fields: Mapping[str, object], commit: str | None) -> Opened:
    if weights.name.endswith(".safetensors"):
        return Opened(place, weights, fields, read_header(weights), None, commit)
    pickled = read_pickled(weights)
    return Opened(place, weights, fields, pickled.header, pickled.asks_for, commit)


def _beside(path: Path) -> tuple[Path, bytes, str]:
    """The weights, the config and where that is, of one of the two files."""
    folder = path.parent
    if path.name == CONFIG_NAME:
        found = next((folder / name for name in (SAFETENSORS_NAME, BIN_NAME) if (folder / name).exists()), None)
        if found is None:
            raise CheckpointError(f"{folder} has an {CONFIG_NAME} and no weights beside it")
        path = found
    config = folder / CONFIG_NAME
    if not config.is_file():
        names = read_header(path).entries if path.name.endswith(".safetensors") else {}
        what = foreign_names(names)
        raise CheckpointError(
            f"{path} has no {CONFIG_NAME} beside it, without which nobody knows what its tensors mean."
            + (f" Probably {what}" if what else "")
        )
    return path, finished_config(config), str(config)
