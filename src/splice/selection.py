"""Which adapters take effect now. One `Selection` is shared by all adapted layers of a model."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import NamedTuple

import torch

BASE = "__base__"


class Group(NamedTuple):
    """The rows of a batch that use one adapter."""

    # The adapter's name.
    name: str
    # The rows, counted from 0, in their order.
    rows: list[int]
    # The same as a tensor on the batch's device, (rows,).
    indices: torch.Tensor


class Groups(list[Group]):
    """The groups of a batch, with the ways to compute them that layers have worked out: the next layer takes the same."""

    def __init__(self, groups: Iterable[Group] = ()) -> None:
        super().__init__(groups)
        # Keyed and filled by whoever computes.
        self.ways: dict[tuple[int, ...], object] = {}


@dataclass(frozen=True)
class Rows:
    """One adapter name for every row of a batch; `BASE` means no adapter.

    While generating, each row may be repeated (beams, several sequences for one prompt), so a batch may hold a multiple
    of these rows; an encoder still gets each row once.
    """

    # One name for each row.
    names: tuple[str, ...]
    # Whether a batch may hold a multiple of these rows.
    may_repeat: bool = False
    # How many rows an input without a dimension for tokens may have, whose rows may be tokens; empty where nobody knows.
    flat: set[int] = field(default_factory=set, compare=False, repr=False)
    # What `groups` has made, by the size of the batch and its device: every layer of a call asks for the same.
    made: dict[tuple[int, torch.device, bool], Groups] = field(default_factory=dict, compare=False, repr=False)
    # The slot of each row's adapter, (rows,), -1 for none, where all of them are in slots: a compiled graph reads this and no
    # names, so that it holds for any names. None where some are elsewhere, and where nothing is compiled.
    seats: torch.Tensor | None = field(default=None, compare=False, repr=False)
    # Whether `seats` counts in any case, since somebody may have captured the call and will change the tensor.
    by_seats: bool = False

    def seats_of(self, batch: int, flat: bool) -> torch.Tensor:
        """`seats` for a batch of this size, each for as many neighbours; arguments and errors as of `groups`."""
        assert self.seats is not None
        # Nothing here looks at the names: they are what a compiled graph must not depend on.
        if batch != self.seats.shape[0]:
            self._check(batch, flat, self.seats.shape[0])
        return self.seats

    @property
    def alike(self) -> bool:
        """Whether all rows have the same name: then it does not matter which row is which."""
        return len(set(self.names)) < 2

    def note_sizes(self, tensors: Iterable[object]) -> None:
        """Note what the network is called with: tensors (batch, T, ...), of which layers may get all tokens as rows."""
        shapes = [tensor.shape for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.dim() > 1]
        count = len(self.names)
        fit = [shape for shape in shapes if shape[0] == count or (self.may_repeat and shape[0] % count == 0)]
        sizes = {size for shape in fit for size in (shape[0], shape[0] * shape[1])}
        if sizes != self.flat:
            self.flat.clear()
            self.flat.update(sizes)
            self.made.clear()

    def groups(self, batch: int, device: torch.device, flat: bool = False) -> Groups:
        """One group for each adapter, for a batch of this size, without the rows of the bare base.

        Args:
            batch: how many rows there are.
            device: where the batch is.
            flat: whether the rows may be tokens, each row of the batch behind the other.

        Raises:
            ValueError: the batch has another number of rows.
        """
        found = self.made.get((batch, device, flat))
        if found is None:
            self._check(batch, flat, len(self.names))
            found = self.made[batch, device, flat] = _groups(self.names, batch // len(self.names), device)
        return found

    def whole(self, batch: int, device: torch.device) -> Groups:
        """`groups` where all rows are `alike`, for any number of rows in any order."""
        name, rows = self.names[0], list(range(batch))
        if name == BASE:
            return Groups()
        return Groups([Group(name, rows, torch.tensor(rows, dtype=torch.long, device=device))])

    def _check(self, batch: int, flat: bool, count: int) -> None:
        if flat and self.flat:
            fits = batch in self.flat
        else:
            fits = batch == count or (self.may_repeat and batch % count == 0)
        if not fits:
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {count} and {batch} "
                "respectively."
            )


# Of the last calls: a server sends the same mixtures again, and one token at a time.
@lru_cache(maxsize=256)
def _groups(names: tuple[str, ...], repeats: int, device: torch.device) -> Groups:
    found: dict[str, list[int]] = {}
    for row in range(len(names) * repeats):
        found.setdefault(names[row // repeats], []).append(row)
    found.pop(BASE, None)
    # Made in inference mode they would be no use to a call with gradients.
    with torch.inference_mode(False):
        return Groups([Group(name, rows, torch.tensor(rows, device=device)) for name, rows in found.items()])


@dataclass(frozen=True, eq=False)
class Mixture:
    """Several adapters for every row, and how much each token is given of each."""

    # The adapters.
    names: tuple[str, ...]
    # Path of a layer -> (batch, T, adapters), the weights of the tokens there.
    weights: Mapping[str, torch.Tensor]
    # What the sum over the adapters is multiplied with.
    scale: float = 1.0


class Choice(NamedTuple):
    """What one call uses: the same adapters for the whole batch, in order, or one for each row."""

    # The adapters for the whole batch; empty for none.
    names: tuple[str, ...] = ()
    # One adapter for each row, or several for each token; where it is given, `names` is empty.
    rows: Rows | Mixture | None = None


NOTHING = Choice()


class _Brought(threading.local):
    """The choice that the running call of this thread has brought, and the selection that it is meant for."""

    # Not a `ContextVar`: a compiled graph cannot look into one. As an attribute of the object, not of the class: see
    # `kinds/computing.py`.
    own: tuple[Selection, Choice] | None

    def __init__(self) -> None:
        self.own = None


_brought = _Brought()


class OwnLock:
    """A lock that a copy of its owner gets anew: plain ones can be neither copied nor pickled."""

    def __init__(self) -> None:
        # Used itself: in a method of ours an interrupt could come between what is done with it and its release.
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[type[OwnLock], tuple[()]]:
        return OwnLock, ()


class Kept:
    """Choices that calls and backwards in progress go on using, whatever is selected meanwhile.

    A copy of a model begins with none: calls of the original are not its own.
    """

    def __init__(self) -> None:
        # What each call began with, by its thread. One that is made inside another keeps to that.
        self.begun: dict[int, Choice] = {}
        # Of these the ones that something else has been selected for since.
        self.calls: dict[int, Choice] = {}
        # For backwards that recompute what a call with another choice computed: their thread and that choice, by task.
        self.backwards: dict[int, tuple[int, Choice]] = {}

    def find(self) -> Choice | None:
        """What the running thread has to use, if that is not what is selected now."""
        if self.backwards:
            found = self.backwards.get(_backward_task())
            if found is not None:
                return found[1]
        return self.calls.get(threading.get_ident())

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def _backward_task() -> int:
    """The backward that the running thread is part of, also on threads that torch makes for devices; -1 for none."""
    task: int = torch._C._current_graph_task_id()
    return task


class Selection:
    """The active adapters of a model, and whether adapters are enabled at all."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled = True
        # Counts how often it was set. What a single layer was told holds for one epoch.
        self.epoch = 0
        # What every call uses that brings no choice of its own.
        self.choice = NOTHING
        # Calls in progress that keep what they began with, though something else was selected since. While there are none,
        # nobody looks for one: a plain number is what compiled graphs can guard on.
        self._own_choices = 0
        self._counting = OwnLock()
        self._kept = Kept()
        # Adapters that are in base weights now, and on how many layers.
        self.merged: dict[str, int] = {}
        # Whether flags of parameters were changed on a layer alone, so that nothing is known of the adapter's as a whole.
        self.flags_changed = False

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_own_choices": 0}  # calls of the original are not a copy's

    @property
    def root(self) -> Selection:
        """The selection of the model."""
        return self

    def only_here(self) -> LayerSelection:
        """A selection for one layer, which begins as this one and holds until this one is set."""
        return LayerSelection(self)

    def set(self, names: Sequence[str]) -> None:
        """Make these adapters the active ones, on every layer."""
        # What is rare pays: each call only notes what it began with, and this looks for calls that have to keep it.
        kept, here = self._kept, threading.get_ident()
        with self._counting.lock:
            for thread, choice in kept.begun.items():
                if thread != here and thread not in kept.calls:
                    kept.calls[thread] = choice
                    self._own_choices += 1
            self.active = tuple(names)
            self.epoch += 1
            self.choice = Choice(self.active) if self.enabled else NOTHING
            if here in kept.begun:  # from inside a call: it asked for that itself
                kept.begun[here] = self.choice
                self._own_choices -= kept.calls.pop(here, None) is not None

    def forget(self, name: str) -> None:
        """Let an adapter that is gone be active no more. What layers alone were told goes on to hold."""
        epoch = self.epoch
        self.set([active for active in self.active if active != name])
        self.epoch = epoch
        self.merged.pop(name, None)

    def enable(self, enabled: bool) -> None:
        """Whether adapters take effect, on every layer."""
        self.enabled = enabled
        self.set(self.active)

    def current(self) -> Choice:
        """What the running call uses."""
        brought = _brought.own
        if brought is not None and brought[0] is self:
            return brought[1]
        # In this order: whoever changes the choice has counted those who keep the old one before.
        choice = self.choice
        if not self._own_choices:
            return choice
        return self._kept.find() or self.choice

    def of_this_call(self) -> Choice | None:
        """What the running call brought, or keeps; None where it uses what is selected now."""
        brought = _brought.own
        if brought is not None and brought[0] is self:
            return brought[1]
        return self._kept.find() if self._own_choices else None

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """Inside, this thread uses what is selected now, whatever other threads select meanwhile."""
        kept, here = self._kept, threading.get_ident()
        with self._counting.lock:
            outermost = here not in kept.begun
            if outermost:
                kept.begun[here] = self.choice
                for task in [t for t, (thread, _) in kept.backwards.items() if thread == here]:
                    if _backward_task() == -1:  # a backward that ended in an exception tells nobody
                        self._forget_backward(task)
        try:
            yield
        finally:
            if outermost:
                with self._counting.lock:
                    del kept.begun[here]
                    self._own_choices -= kept.calls.pop(here, None) is not None

    def keep_for_backward(self, choice: Choice) -> None:
        """Called inside a backward: what it recomputes from here on uses `choice`."""
        task = _backward_task()
        with self._counting.lock:
            self._forget_backward(task)
            if choice != self.choice:
                self._kept.backwards[task] = (threading.get_ident(), choice)
                self._own_choices += 1
                torch.autograd.Variable._execution_engine.queue_callback(partial(self._forget_backward, task))

    def _forget_backward(self, task: int) -> None:
        with self._counting.lock:
            self._own_choices -= self._kept.backwards.pop(task, None) is not None

    @contextmanager
    def for_this_call(self, choice: Choice) -> Iterator[None]:
        """Inside, calls made by this thread use `choice`."""
        before = _brought.own
        _brought.own = (self, choice)
        try:
            yield
        finally:
            _brought.own = before


class LayerSelection:
    """What one layer alone was told. It goes stale as soon as the model is told something: nobody has to be notified."""

    def __init__(self, model: Selection) -> None:
        self.root = model
        self._follow()

    def _follow(self) -> None:
        self._epoch = self.root.epoch
        self._active, self._enabled, self._choice = self.root.active, self.root.enabled, self.root.choice

    def _renew(self) -> None:
        if self._epoch != self.root.epoch:
            self._follow()

    @property
    def active(self) -> tuple[str, ...]:
        self._renew()
        return self._active

    @property
    def enabled(self) -> bool:
        self._renew()
        return self._enabled

    def only_here(self) -> LayerSelection:
        """Itself: it is the layer's alone already."""
        return self

    def set(self, names: Sequence[str]) -> None:
        """Make these adapters the active ones on this layer."""
        self._renew()
        self._active = tuple(names)
        self._choice = Choice(self._active) if self._enabled else NOTHING

    def enable(self, enabled: bool) -> None:
        """Whether adapters take effect on this layer."""
        self._renew()
        self._enabled = enabled
        self.set(self._active)

    def current(self) -> Choice:
        """What the running call uses here: what it brought, if it brought anything."""
        self._renew()
        return self.root.of_this_call() or self._choice

    def for_this_call(self, choice: Choice) -> AbstractContextManager[None]:
        """As of the model's selection."""
        return self.root.for_this_call(choice)
