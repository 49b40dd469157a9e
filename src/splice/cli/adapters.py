"""Adapters that a command was given, each by a name: `NAME=ADAPTER`, or the adapter's place alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from splice.checkpoint.format import CONFIG_NAME
from splice.cli.known import known, known_methods
from splice.cli.opened import open_adapter

# Tasks whose networks give text. An adapter need not name one.
_TASKS = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")


class Adapter(NamedTuple):
    """An adapter that can be loaded to give text."""

    # Under which name.
    name: str
    # Its folder, or its id on the Hub.
    place: str
    # Its `peft_type`.
    method: str
    # Whether it acts on the call of the whole network, and not on layers alone.
    whole_call: bool
    # The base that its config names; None where it names none.
    base: str | None


def named(text: str) -> tuple[str, str]:
    """(name, place) of `NAME=ADAPTER`. Without a name it is the last part of the place."""
    name, equals, place = text.partition("=")
    if not equals or (Path(text) / CONFIG_NAME).is_file():
        name, place = Path(text).name, text
    if not name or not place:
        raise ValueError(f"{text!r} is no NAME=ADAPTER")
    return name, place


def adapter_from(text: str, subfolder: str | None, revision: str | None) -> Adapter:
    """Look into the adapter that `NAME=ADAPTER` stands for.

    Raises:
        CheckpointError: it cannot be found or read.
        ValueError: it is of a method or for a task that gives no text.
    """
    name, place = named(text)
    fields = open_adapter(place, subfolder, revision).fields
    method, task = fields["peft_type"], fields.get("task_type")
    found = known(method)
    if found is None:
        raise ValueError(
            f"adapter {name!r}: {method!r} is no method that is known here; known are {', '.join(known_methods())}"
        )
    if task not in _TASKS:
        raise ValueError(f"adapter {name!r} at {place} is for {task}, which gives no text")
    base = fields.get("base_model_name_or_path")
    folder = str(Path(place).parent) if Path(place).is_file() else place
    return Adapter(name, folder, str(method), found.whole_call, str(base) if base else None)


def check_names(names: Sequence[str]) -> None:
    """Raise where two adapters have one name.

    Raises:
        ValueError: with how to name them.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two adapters are called {twice[0]!r}: give each a name of its own, NAME=ADAPTER")


def base_of(adapters: Iterable[Adapter]) -> str:
    """The base that the adapters' configs name.

    Raises:
        ValueError: they name none, or several.
    """
    adapters = list(adapters)
    bases = sorted({adapter.base for adapter in adapters if adapter.base})
    if len(bases) != 1:
        what = f"the adapters name {len(bases)}: {', '.join(bases)}" if bases else "no adapter names one"
        raise ValueError(f"--base says which base it is, and {what}")
    return bases[0]
