"""Registered adapters that are on the model: putting them there, and choosing which ones have to go."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from splice.errors import NoRoomError, counted, sized
from splice.fleet.limits import StoreLimits
from splice.fleet.uses import Uses
from splice.kinds.reading import Checkpoint
from splice.loading.load import place_new, plan_new
from splice.loading.options import LoadOptions
from splice.loading.plan import Fitted
from splice.selection import LayerSelection
from splice.surgery.coexistence import check_together
from splice.surgery.tuner import Tuner
from splice.surgery.undo import Undo

# Names that a message lists.
_LISTED = 5


class State(NamedTuple):
    """What tells that somebody has trained an adapter, or written to its tensors."""

    # How often its tensors were written to, in all.
    written: int
    # How many of them require grad.
    trained: int


class Resident(NamedTuple):
    """A registered adapter on the model."""

    # Bytes of its tensors, those in a slot left out.
    nbytes: int
    # As it was when it was loaded.
    state: State


class Planned(NamedTuple):
    """An adapter that is about to be put on the model. All that can be checked before has been."""

    # Its name.
    name: str
    # Its plan, its checkpoint and its config.
    found: Fitted
    # Of the load.
    options: LoadOptions
    # Takes it off again, if it cannot be put on whole.
    undo: Undo
    # Bytes of its tensors that a slot has room for.
    seated: int
    # Bytes of all others.
    beside: int
    # How long that took.
    seconds: float


class _Need:
    """What is too much: so many slots, adapters and bytes have to become free."""

    def __init__(self, slots: int, count: int, nbytes: int) -> None:
        self.slots, self.count, self.nbytes = slots, count, nbytes

    @property
    def is_met(self) -> bool:
        return self.slots <= 0 and self.count <= 0 and self.nbytes <= 0


class DeviceLevel:
    """The registered adapters on a model, by name; the one that was used last is the last.

    Whoever asks or changes it holds the store's lock, and the tuner's `changing` where the model changes.
    """

    def __init__(self, tuner: Tuner, heads: Sequence[str], uses: Uses) -> None:
        self.tuner, self.heads, self.uses = tuner, heads, uses
        self.resident: OrderedDict[str, Resident] = OrderedDict()
        self.nbytes = 0
        # Those that are never evicted.
        self.pinned: set[str] = set()

    def add(self, name: str, resident: Resident) -> None:
        """Note that an adapter is on the model."""
        self.resident[name] = resident
        self.nbytes += resident.nbytes

    def drop(self, name: str) -> None:
        """Note that an adapter is not on the model any more."""
        found = self.resident.pop(name, None)
        if found is not None:
            self.nbytes -= found.nbytes
            self.uses.forget(name)

    def count_again(self) -> None:
        """Note anew which bytes lie in slots."""
        for name, before in self.resident.items():
            self.resident[name] = before._replace(nbytes=self._bytes_outside(name))
        self.nbytes = sum(resident.nbytes for resident in self.resident.values())

    # -- putting adapters on

    def plan(self, checkpoint: Checkpoint, options: LoadOptions) -> Planned:
        """The plan of a load, with all that can be checked before the model changes.

        Raises:
            AdapterMismatchError: the checkpoint does not fit.
            ValueError: it cannot be applied to this model.
        """
        undo, reserved = Undo(self.tuner), self.tuner.reserved_slots
        found = plan_new(self.tuner, checkpoint, options, self.heads, undo)
        shared = {follower.leader for follower in found.plan.followers}
        seated = beside = 0
        for placement in found.plan.placements:
            own = [suffix for suffix in placement.slots if suffix not in placement.leaders]
            dtypes = (placement.dtype(suffix, options.autocast) for suffix in own)
            size = sum(math.prod(placement.slots[s].shape) * dtype.itemsize for s, dtype in zip(own, dtypes))
            if reserved is not None and reserved.seats(placement, shared):
                seated += size
            else:
                beside += size
        seconds = time.perf_counter() - options.started
        return Planned(options.adapter_name, found, options, undo, seated, beside, seconds)

    def put(self, planned: Planned) -> Resident:
        """Put it on the model. If that fails, `take_back` makes the model what it was."""
        # With those that came since it was planned.
        check_together(self.tuner, planned.found.config)
        # Not in the mode of the call that asked for it: the next one may have gradients.
        with torch.inference_mode(False):
            place_new(self.tuner, planned.found, planned.options, self.tuner.is_bare, planned.undo)
        return Resident(self._bytes_outside(planned.name), self.state_of(planned.name))

    def take_back(self, planned: Planned) -> None:
        """Take it off, whole or in part."""
        # Not by `Undo.run`: selections and modes may be other threads' doing, and others have gone since it was planned.
        if planned.name in self.tuner.placed:
            self.tuner.discard(planned.name)
        self.tuner.order.pop(planned.name, None)
        if self.tuner.reserved_slots is not None:
            self.tuner.reserved_slots.release(planned.name)
        self.drop(planned.name)

    def _bytes_outside(self, name: str) -> int:
        total = 0
        for path, layer in self.tuner.placed[name].items():
            stack = self.tuner.adapted[path].splice_host.stack if path in self.tuner.adapted else None
            if stack is None or stack.find(name, layer) < 0:
                total += sum(t.nbytes for suffix, t in layer.named_slots() if suffix not in layer.leaders)
        return total

    def state_of(self, name: str) -> State:
        """How an adapter on the model is now."""
        written = trained = 0
        for layer in self.tuner.placed[name].values():
            for registry, key, _ in layer.registered.values():
                tensor: torch.Tensor = registry[key]
                written += 0 if tensor.is_inference() else tensor._version
                trained += tensor.requires_grad
        return State(written, trained)

    # -- making room

    def victims(self, incoming: Sequence[Planned], wanted: Container[str], limits: StoreLimits) -> list[str]:
        """Those that have to go so that others can come: unused ones first, of these the one that is longest unused.

        Args:
            incoming: what is about to come.
            wanted: adapters that may not go.
            limits: of the store.

        Raises:
            NoRoomError: not enough of them can go.
        """
        reserved = self.tuner.reserved_slots
        chosen: dict[str, None] = {}
        stay: dict[str, str] = {}
        beside = sum(planned.beside for planned in incoming)
        if reserved is not None:
            # The largest ones last: where slots are too few, they cost the most bytes beside them.
            in_slots = sorted(planned.seated for planned in incoming if planned.seated)
            need = _Need(len(in_slots) - reserved.free, 0, 0)
            self._choose(need, wanted, chosen, stay, reserved.numbers)
            # Adapters for which no slot becomes free work as well beside them.
            beside += sum(in_slots[len(in_slots) - max(need.slots, 0) :])
        leaving = sum(self.resident[name].nbytes for name in chosen)
        room, count = limits.device_bytes, limits.device_count
        need = _Need(
            0,
            0 if count is None else len(self.resident) - len(chosen) + len(incoming) - count,
            0 if room is None else self.nbytes - leaving + beside - room,
        )
        self._choose(need, wanted, chosen, stay, self.resident)
        if not need.is_met:
            raise NoRoomError(self._no_room(incoming, beside, limits, stay))
        return list(chosen)

    def _choose(
        self,
        need: _Need,
        wanted: Container[str],
        chosen: dict[str, None],
        stay: dict[str, str],
        among: Container[str],
    ) -> None:
        """Choose until the need is met; note in `stay` why others cannot go."""
        if need.is_met:
            return
        told = self._told_to_layers()
        for name in self._unused_first():
            if need.is_met:
                return
            if name in wanted or name in chosen or name in stay or name not in among:
                continue
            if need.slots <= 0 and need.count <= 0 and not self.resident[name].nbytes:
                continue
            why = self.why_not(name, told)
            if why:
                stay[name] = why
                continue
            chosen[name] = None
            need.slots -= 1
            need.count -= 1
            need.nbytes -= self.resident[name].nbytes

    def _unused_first(self) -> Iterator[str]:
        for used in (False, True):
            yield from (name for name in self.resident if (name in self.uses) is used)

    def _told_to_layers(self) -> set[str]:
        """Adapters that single layers were told to use."""
        of_layers = (host.selection for host in self.tuner.hosts.values())
        return {name for own in of_layers if isinstance(own, LayerSelection) for name in own.active}

    def why_not(self, name: str, told: Container[str] | None = None) -> str:
        """Why an adapter cannot be evicted; empty where it can, once no call uses it any more."""
        if name in self.pinned:
            return "pinned"
        if name in self.tuner.selection.active:
            return "active"
        if name in self.tuner.selection.merged:
            return "merged"
        if name in (self._told_to_layers() if told is None else told):
            return "active on single layers"
        if self.uses.needed_by_graph(name):
            return "needed by a backward that has not run yet"
        now, before = self.state_of(name), self.resident[name].state
        if now.trained > before.trained:
            return "in training"
        return "changed since it was loaded" if now.written > before.written else ""

    def _no_room(self, incoming: Sequence[Planned], beside: int, limits: StoreLimits, stay: Mapping[str, str]) -> str:
        new = ", ".join(repr(planned.name) for planned in incoming[:_LISTED])
        more = f" and {len(incoming) - _LISTED} more" if len(incoming) > _LISTED else ""
        text = (
            f"no room on the model for {new}{more} ({sized(beside)}): the store's limits are {_limits_text(limits)}, and "
            f"{counted(len(self.resident), 'adapter')} with {sized(self.nbytes)} are there"
        )
        if stay:
            listed = ", ".join(f"{name!r} ({why})" for name, why in list(stay.items())[:_LISTED])
            rest = f" and {len(stay) - _LISTED} more" if len(stay) > _LISTED else ""
            text += f", of which cannot be evicted: {listed}{rest}"
        return f"{text}. Ask for fewer at once, unpin or select others, or raise `model.adapter_store.limits`."


def _limits_text(limits: StoreLimits) -> str:
    count = None if limits.device_count is None else counted(limits.device_count, "adapter")
    size = None if limits.device_bytes is None else sized(limits.device_bytes)
    return " and ".join(part for part in (count, size) if part is not None)
