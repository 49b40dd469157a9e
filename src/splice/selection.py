"""Which adapters take effect now. One `Selection` is shared by all adapted layers of a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from splice.surgery.adapted import Host

BASE = "__base__"


@dataclass(frozen=True)
class Group:
    """The rows of a batch that use one adapter: as numbers, and as a tensor of them on the batch's device."""

    name: str
    rows: list[int]
    index: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """One adapter name for every row of a batch; `BASE` means no adapter.

    While generating, each row may be repeated (beams, several sequences for one prompt), so a batch may hold a multiple
    of these rows; an encoder still gets each row once.
    """

    names: tuple[str, ...]
    may_repeat: bool = False
    made: dict[Any, list[Group]] = field(default_factory=dict, compare=False, repr=False)

    def groups(self, batch: int, device: torch.device) -> list[Group]:
        """One group for each adapter, for a batch of this size, without the rows of the bare base.

        Raises:
            ValueError: the batch has another number of rows.
        """
        if batch != len(self.names) and (not self.may_repeat or batch % len(self.names)):
            raise ValueError(f"`adapter_names` names {len(self.names)} rows, and the input has {batch}")
        found = self.made.get((batch, device))
        if found is None:  # every layer of a call asks for the same
            by_name = _rows_by_name(self.names, batch // len(self.names))
            found = [Group(name, rows, torch.tensor(rows, device=device)) for name, rows in by_name]
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
        # Adapters that are in base weights now, and on how many layers.
        self.merged: dict[str, int] = {}
        # Layers that were told something of their own, and whether flags of parameters were changed on a layer alone.
        self._elsewhere: list[Host] = []
        self.flags_changed = False

    @property
    def root(self) -> Selection:
        """The selection of the model."""
        return self

    def only_here(self, host: Host) -> Selection:
        """A selection for one layer, which begins as this one and lasts until this one is set."""
        self._elsewhere.append(host)
        return LayerSelection(self)

    def set(self, names: Sequence[str]) -> None:
        for host in self._elsewhere:
            host.selection = self
        self._elsewhere.clear()
        self.active = tuple(names)
        self._shared = Choice(self.active) if self.enabled else NOTHING

    def enable(self, enabled: bool) -> None:
        self.enabled = enabled
        self.set(self.active)

    def current(self) -> Choice:
        """What the running call uses."""
        if not self._own_choices:
            return self._shared
        return self.of_this_call() or self._shared

    def of_this_call(self) -> Choice | None:
        """What the running call brought."""
        own = _of_this_call.get()
        return own[1] if own is not None and own[0] is self else None

    def for_this_call(self, choice: Choice) -> AbstractContextManager[None]:
        """Inside, calls made by this thread use `choice`."""
        return self._for_this_call(choice)

    @contextmanager
    def _for_this_call(self, choice: Choice) -> Iterator[None]:
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


class LayerSelection(Selection):
    """The selection of one layer that was told something of its own."""

    def __init__(self, model: Selection) -> None:
        super().__init__()
        self.model = model
        self.enabled = model.enabled
        self.set(model.active)

    @property
    def root(self) -> Selection:
        return self.model

    def only_here(self, host: Host) -> Selection:
        return self

    def current(self) -> Choice:
        return (self.model.of_this_call() if self.model._own_choices else None) or self._shared

    def for_this_call(self, choice: Choice) -> AbstractContextManager[None]:
        return self.model.for_this_call(choice)
