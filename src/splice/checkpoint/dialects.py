"""Dialects: how other programs name and store in files what is an adapter here.

A method registers those that its adapters are written in, in a file of its own called `dialects.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from splice.discovery import find_beside

if TYPE_CHECKING:
    from splice.checkpoint.tensors import Weights
    from splice.checkpoint.unread import Unread

# The format's own dialect, which every method has.
OWN = "peft"

# Component -> paths of the layers that its network has; None where the network is not known.
PathsOf = Callable[[str], Collection[str] | None]


class Part(NamedTuple):
    """The adapter of one network, in the words of the format."""

    # The network's name in a pipeline ("unet"); "" where nothing says it.
    component: str
    # The fields of its config.
    fields: Mapping[str, object]
    # Its tensors, by their keys.
    tensors: Mapping[str, Unread]


class Dialect(NamedTuple):
    """How a program writes adapters of one method."""

    # As people ask for it.
    name: str
    # The `peft_type` of the adapters that can be written so.
    peft_type: str
    # What a file is called where only its folder is named.
    file_name: str
    # Whether a file with tensors of these names is one of these; None where such files are only written.
    recognises: Callable[[Collection[str]], bool] | None
    # What such a file holds; raises where it cannot be told.
    read: Callable[[Weights, PathsOf], list[Part]] | None
    # Writes the file, and gives a line for each thing that its readers should know; given the fields of the base's config,
    # empty where they are not known. Raises before it begins where that cannot be done.
    write: Callable[[Sequence[Part], Mapping[str, object], Path], Sequence[str]]
    # Whether the base has to be known to write it.
    needs_base: bool = False


_DIALECTS: dict[str, Dialect] = {}


def register_dialect(dialect: Dialect) -> None:
    """Make a dialect known."""
    _DIALECTS[dialect.name] = dialect


def dialects() -> Mapping[str, Dialect]:
    """Every dialect but the format's own, by name."""
    find_beside("dialects")
    return MappingProxyType(_DIALECTS)
