"""Which adapters take effect now. One `Selection` is shared by all adapted layers of a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

BASE = "__base__"


@dataclass(frozen=True)
class Rows:
    """One adapter name for every row of a batch; `BASE` means no adapter.

    While generating, each row may be repeated (beams, several sequences for one prompt), so a batch may hold a multiple
    of these rows; an encoder still gets each row once.
    """

    names: tuple[str, ...]
    may_repeat: bool = False
    made: dict[Any, list[tuple[str, torch.Tensor]]] = field(default_factory=dict, compare=False, repr=False)

    def groups(self, batch: int, device: torch.device) -> list[tuple[str, torch.Tensor]]:
        """(adapter name, indices of its rows) for a batch of this size, without the rows of the bare base.

        Raises:
            ValueError: the batch has another number of rows.
        """
        if batch != len(self.names) and (not self.may_repeat or batch % len(self.names)):
            raise ValueError(f"`adapter_names` names {len(self.names)} rows, and the input has {batch}")
        found = self.made.get((batch, device))
        if found is None:  # every layer of a call asks for the same
            by_name = _rows_by_name(self.names, batch // len(self.names))
            found = [(name, torch.tensor(rows, device=device)) for name, rows in by_name]
            self.made[batch, device] = found
        return found


@lru_cache(maxsize=256)
def _rows_by_name(names: tuple[str, ...], repeats: int) -> list[tuple[str, list[int]]]:
    found: dict[str, list[int]] = {}
    for row in range(len(names) * repeats):
        found.setdefault(names[row // repeats], []).append(row)
    found.pop(BASE, None)
    return list(found.items())


@dataclass(frozen=True)
class Choice:
    """What one call uses: the same adapters for the whole batch, in order, or one for each row."""

    names: tuple[str, ...] = ()
    rows: Rows | None = None


NOTHING = Choice()

# A call may bring its own choice. It belongs to one selection and one thread, so no other call sees it.
_COUNTING = threading.Lock()
_of_this_call: ContextVar[tuple[Selection, Choice] | None] = ContextVar("splice_choice", default=None)


class Selection:
    """The active adapters of a model, and whether adapters are enabled at all."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self._shared = NOTHING
        # Calls in progress that brought a choice of their own. While there are none, nobody looks for one: a plain number
        # is what compiled graphs can guard on.
        self._own_choices = 0

    def set(self, names: Sequence[str]) -> None:
        self.active = tuple(names)
        self._shared = Choice(self.active) if self.enabled else NOTHING

    def enable(self, enabled: bool) -> None:
        self.enabled = enabled
        self.set(self.active)

    def current(self) -> Choice:
        """What the running call uses."""
        if not self._own_choices:
            return self._shared
        own = _of_this_call.get()
        return own[1] if own is not None and own[0] is self else self._shared

    @contextmanager
    def for_this_call(self, choice: Choice) -> Iterator[None]:
        """Inside, calls made by this thread use `choice`."""
        self._count(1)
        token = _of_this_call.set((self, choice))
        try:
            yield
        finally:
            _of_this_call.reset(token)
            self._count(-1)

    def _count(self, change: int) -> None:
        with _COUNTING:
            self._own_choices += change
