"""Adapters that a command was given, each by a name: `NAME=ADAPTER`, or the adapter's place alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from splice.checkpoint.format import CONFIG_NAME
from splice.cli.known import known, known_methods
from splice.cli.opened import open_adapter

# A `task_type` whose networks give text. An adapter need not name one.
_PURPOSES = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")
# Fields of configs that say how many tasks an adapter knows.
_COUNTS = ("num_tasks", "n_tasks")


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
    # How many tasks it knows, of which each row says one; None where its method has no such thing.
    tasks: int | None = None


def named(text: str) -> tuple[str, str]:
    """(name, place) of `NAME=ADAPTER`. Without a name it is the last part of the place."""
    name, equals, place = text.partition("=")
    if not equals or (Path(text) / CONFIG_NAME).is_file():
        name, place = Path(text).name, text
    if not name or not place:
        raise ValueError(f"{text!r} is no NAME=ADAPTER")
    return name, place


def adapter_from(text: str, subfolder: str | None, revision: str | None, task: int | None = None) -> Adapter:
    """Look into the adapter that `NAME=ADAPTER` stands for.

    Args:
        text: name and place.
        subfolder: a folder inside of the place.
        revision: of the repository on the Hub.
        task: the number of the task that adapters are asked for which know several; None if nobody said.

    Raises:
        CheckpointError: it cannot be found or read.
        ValueError: it is of a method or for a task that gives no text, or does not know this one.
    """
    name, place = named(text)
    fields = open_adapter(place, subfolder, revision).fields
    method, purpose = fields["peft_type"], fields.get("task_type")
    found = known(method)
    if found is None:
        raise ValueError(
            f"adapter {name!r}: {method!r} is no method that is known here; known are {', '.join(known_methods())}"
        )
    if purpose not in _PURPOSES:
        raise ValueError(f"adapter {name!r} at {place} is for {purpose}, which gives no text")
    base = fields.get("base_model_name_or_path")
    folder = str(Path(place).parent) if Path(place).is_file() else place
    counts = [fields.get(field, found.fields[field]) for field in _COUNTS if field in found.fields]
    tasks = next((count for count in counts if isinstance(count, int)), None)
    if tasks is not None and not 0 <= (-1 if task is None else task) < tasks:
        said = "and none was said" if task is None else f"and {task} is none of them"
        raise ValueError(
            f"adapter {name!r} knows the tasks 0 to {tasks - 1}, {said}: --task-id says which one is asked for"
        )
    return Adapter(name, folder, str(method), found.whole_call, str(base) if base else None, tasks)


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
