"""The store: any number of registered adapters, of which those in use are on the model.

Two locks. The tuner's `changing` is held while the model changes: one thread at a time puts adapters on and takes them off.
The store's own is held for moments: who uses what, and what is where. A call whose adapters are on the model takes the second
alone. Nobody waits for the first with the second in hand.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from typing import NamedTuple
from weakref import WeakSet

from splice.errors import NoRoomError
from splice.fleet.device import DeviceLevel, Planned
from splice.fleet.host import HostLevel, InHost
from splice.fleet.limits import StoreLimits
from splice.fleet.registering import Entry, Places, Registered, register
from splice.fleet.stats import Counters, StoreStats
from splice.fleet.uses import Held, Use, Uses
from splice.loading.options import LoadOptions
from splice.surgery.tuner import Tuner

# How long a wait lasts before its reason is looked at again, in seconds. Graphs that are freed wake nobody.
_TICK = 0.05


class _Fetched(NamedTuple):
    """An adapter that is about to be put on the model, in host memory."""

    # The adapter.
    held: InHost
    # How long it took to read it.
    seconds: float
    # Whether it was there before.
    was_there: bool


class AdapterStore:
    """Registered adapters, of which those in use are on the model: `model.adapter_store`.

    Each comes where it is first used (`adapter_names`, `set_adapter`, `pin`), and goes when others need its room, the one
    that is unused for the longest time first. It does not go while a call uses it or a backward may need it, while it is
    active, pinned or merged, nor once it was trained or written to.
    """

    def __init__(self, tuner: Tuner, heads: Sequence[str]) -> None:
        self._tuner = tuner
        self._entries: dict[str, Entry] = {}
        self._limits = StoreLimits()
        self._lock = threading.Condition(threading.RLock())
        self._uses = Uses()
        self._device = DeviceLevel(tuner, heads, self._uses)
        self._host = HostLevel()
        self._counters = Counters()
        # Adapters that go as soon as no call uses them: no new call does.
        self._leaving: set[str] = set()
        # The one that is about to come: its own name is free for it.
        self._coming = ""
        # Calls that wait until they may change the model, or do.
        self._waiting: WeakSet[Use] = WeakSet()
        # What threads are reading into host memory.
        self._reading: dict[str, Future[InHost | None]] = {}
        self._ahead: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of a model has the adapters that are on it, and no store

    # -- what people call

    @property
    def names(self) -> tuple[str, ...]:
        """The registered adapters, on the model or not."""
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        """Whether an adapter of this name is registered."""
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def on_device(self) -> tuple[str, ...]:
        """Those that are on the model, the one that is unused for the longest time first."""
        with self._lock:
            return tuple(self._device.resident)

    @property
    def limits(self) -> StoreLimits:
        """How many may be on the model and in host memory. Lower ones evict at once.

        Raises:
            NoRoomError: adapters that cannot be evicted are more than that; the limits stay as they were.
        """
        return self._limits

    @limits.setter
    def limits(self, limits: StoreLimits) -> None:
        with self._tuner.changing:
            before, self._limits = self._limits, limits
            try:
                self._make_room([], (), waits=True)
            except BaseException:
                self._limits = before
                raise
            with self._lock:
                self._counters.host_evictions += self._host.trim(limits)

    def pin(self, name: str) -> None:
        """Bring an adapter in, and let it stay until `unpin`.

        Raises:
            ValueError: it is not registered; and all that a load raises.
            NoRoomError: it does not fit beside those that cannot be evicted.
        """
        self._check_known([name])
        with self.using([name]), self._lock:
            self._device.pinned.add(name)

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again, when others need its room.

        Raises:
            ValueError: it is not registered.
        """
        self._check_known([name])
        with self._lock:
            self._device.pinned.discard(name)

    def evict(self, name: str) -> None:
        """Take an adapter off the model now; it stays registered. Waits for calls that use it.

        Raises:
            ValueError: it is not registered, or cannot be evicted.
        """
        self._check_known([name])
        with self._tuner.changing:
            with self._lock:
                if name not in self._device.resident:
                    return
                self._wait_until_unused(name)
                why = self._device.why_not(name)
                if why:
                    self._leaving.discard(name)
                    raise ValueError(f"adapter {name!r} cannot be evicted: it is {why}.{_mend(name, why)}")
            self._take_off([name])

    def prefetch(self, names: Iterable[str]) -> Future[None]:
        """Bring adapters in that are about to be used, in a thread of its own and in this order.

        Where there is no room on the model for one without waiting for a call, it comes as far as host memory.

        Returns:
            A future that is done when they are there; `result()` raises what a load raised. A call that uses an adapter
            whose load failed raises it too.

        Raises:
            ValueError: one is not registered.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        self._check_known(wanted)
        with self._lock:
            if self._ahead is None:
                self._ahead = ThreadPoolExecutor(1, "splice-prefetch")
            return self._ahead.submit(self._bring_ahead, wanted)

    def stats(self) -> StoreStats:
        """What is where now, and what the store has done so far."""
        with self._lock:
            counters = self._counters
            return StoreStats(
                registered=len(self._entries),
                on_device=len(self._device.resident),
                device_bytes=self._device.nbytes,
                in_host=len(self._host),
                host_bytes=self._host.nbytes,
                hits=counters.hits,
                host_hits=counters.host_hits,
                misses=counters.misses,
                evictions=counters.evictions,
                host_evictions=counters.host_evictions,
                loads=counters.loads,
                load_p50=counters.quantile(0.5),
                load_p99=counters.quantile(0.99),
            )

    def register(self, adapters: Places, options: LoadOptions) -> Registered:
        """As `PeftModel.register_adapters`; `options` are those of each load."""
        started = time.perf_counter()
        entries, failed = register(adapters, options)
        with self._tuner.changing:
            for name, entry in list(entries.items()):
                why = self._enter(name, entry)
                if why:
                    failed[name] = why
                    del entries[name]
        return Registered(tuple(entries), failed, time.perf_counter() - started)

    def _enter(self, name: str, entry: Entry) -> str:
        """Register one, in the place of an earlier one of its name; why that cannot be, if it cannot."""
        with self._lock:
            before = self._entries.get(name)
            if before is None and name in self._tuner.peft_config:
                return "the model has an adapter of this name already, which was not registered. Choose another name."
            if before is not None and not before.is_same_as(entry):
                self._host.drop(name)
                if name in self._device.resident:
                    used = "in use by a running call" if name in self._uses else ""
                    why = used or self._device.why_not(name)
                    if why:
                        return f"the one that was registered before is on the model and cannot go: it is {why}"
                    self._take_off([name])
            self._entries[name] = entry
            return ""

    def _check_known(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self._entries]
        if unknown:
            raise ValueError(f"adapter {unknown[0]!r} is not registered.{self.told(unknown)}")

    # -- what the network asks (`surgery.bringing.Store`)

    def using(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Inside, those of these adapters that are registered are on the model, and stay there.

        Raises:
            NoRoomError: there is no room for all of them; and all that a load raises.
        """
        wanted = [name for name in dict.fromkeys(names) if name in self._entries]
        return Use(self, wanted) if wanted else nullcontext()

    def held(self, names: Iterable[str]) -> Held | None:
        """What keeps those of these adapters that are registered on the model as long as it lives."""
        wanted = [name for name in dict.fromkeys(names) if name in self._entries]
        if not wanted:
            return None
        with self._lock:
            return self._uses.hold(wanted)

    def keeps_from(self, name: str) -> bool:
        """Whether a new adapter cannot have this name."""
        return name in self._entries and name != self._coming

    def told(self, unknown: Iterable[str]) -> str:
        """How many adapters are registered and which has the nearest name, for a message."""
        unknown = list(unknown)
        for name in unknown:
            if name in self._entries:  # of what works on the adapters that are there
                return f" {name!r} is registered: `model.adapter_store.pin({name!r})` brings it in."
        count = len(self._entries)
        text = f" {count:,} {'adapter is' if count == 1 else 'adapters are'} registered"
        for name in unknown:
            near = get_close_matches(name, self._entries, 1)
            if near:
                return f"{text}; the nearest name to {name!r} is {near[0]!r}."
        return f"{text}, none with a name like that."

    def left(self, name: str) -> None:
        """Note that an adapter was taken off the model."""
        with self._lock:
            self._device.drop(name)

    def moved(self) -> None:
        """Note that adapters have come to be in slots, or beside them."""
        with self._lock:
            self._device.count_again()

    def forget(self, name: str) -> None:
        """Let an adapter be registered no more, once no running call uses it.

        Raises:
            NoRoomError: the calls that use it wait themselves.
        """
        with self._lock:
            if name in self._entries:
                self._wait_until_unused(name)
                self._leaving.discard(name)
                self._host.drop(name)
                self._device.pinned.discard(name)
                del self._entries[name]

    # -- calls

    def begin(self, use: Use) -> None:
        """Have these adapters on the model, and note that a call uses them."""
        with self._lock:
            resident, names = self._device.resident, use.names
            if all(name in resident and name not in self._leaving for name in names):
                self._counters.hits += len(names)
                self._note(use)
                return
        self._bring(names, use)

    def end(self, use: Use) -> None:
        """Note that the call has ended."""
        with self._lock:
            self._uses.end(use)
            if self._leaving:
                self._lock.notify_all()

    def _note(self, use: Use) -> None:
        for name in use.names:
            self._device.resident.move_to_end(name)
        self._uses.begin(use)

    # -- bringing in

    def _bring(self, names: Sequence[str], use: Use | None = None) -> None:
        """Put on the model what is not there; for the `use` of a call, waiting until there is room.

        Raises:
            NoRoomError: there is no room for all of them; and all that a load raises.
        """
        most = self._limits.device_count
        if most is not None and len(names) > most:
            raise NoRoomError(
                f"{len(names)} registered adapters are asked for at once, and the store may have {most} on the model "
                f"(`model.adapter_store.limits`). Ask for fewer at once, or raise `device_count`."
            )
        fetched = self._fetch(names)
        try:
            if use is not None:
                with self._lock:
                    self._waiting.add(use)
            # What one call needs comes at once, and it holds nothing while it waits: so no two calls wait for one another.
            with self._tuner.changing:
                missing = [name for name in names if name not in self._device.resident]
                planned = [self._planned(name, fetched.get(name)) for name in missing]
                if not self._make_room(planned, names, waits=use is not None):
                    return
                for item in planned:
                    self._put(item, fetched.get(item.name))
                if use is not None:
                    with self._lock:
                        self._count(names, missing, fetched)
                        self._note(use)
        finally:
            if use is not None:
                with self._lock:
                    self._waiting.discard(use)

    def _bring_ahead(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                self._bring([name])
            except NoRoomError:  # the call that uses it may find room, or says why there is none
                continue

    def _count(self, names: Sequence[str], missing: Sequence[str], fetched: dict[str, _Fetched]) -> None:
        in_host = sum(fetched[name].was_there for name in missing if name in fetched)
        self._counters.hits += len(names) - len(missing)
        self._counters.host_hits += in_host
        self._counters.misses += len(missing) - in_host

    def _planned(self, name: str, fetched: _Fetched | None) -> Planned:
        """The plan of a load.

        Raises:
            ValueError: it was deleted meanwhile; and all that a plan raises.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"adapter {name!r} was deleted while a call waited for it.{self.told([name])}")
        started = time.perf_counter()
        try:
            self._coming = name
            checkpoint = entry.open() if fetched is None else fetched.held.checkpoint
            return self._device.plan(checkpoint, entry.options._replace(started=started))
        finally:
            self._coming = ""

    def _put(self, planned: Planned, fetched: _Fetched | None) -> None:
        started = time.perf_counter()
        try:
            resident = self._device.put(planned)
            with self._lock:
                self._device.add(planned.name, resident)
        except BaseException:
            with self._lock:
                self._device.take_back(planned)
            raise
        seconds = planned.seconds + time.perf_counter() - started
        self._counters.loaded(seconds + (0.0 if fetched is None else fetched.seconds))

    # -- making room

    def _make_room(self, incoming: Sequence[Planned], wanted: Sequence[str], waits: bool) -> bool:
        """Evict what has to go; whether that could be done, where it would have to wait for calls and does not.

        Raises:
            NoRoomError: not enough can go.
        """
        with self._lock:
            try:
                while True:
                    chosen = self._device.victims(incoming, wanted, self._limits)
                    used = [name for name in chosen if name in self._uses]
                    if not used:
                        break
                    if not waits:
                        return False
                    # No new call uses them. They are chosen anew each time: a graph of the old ones may need them.
                    self._leaving.update(chosen)
                    self._wait(used)
            except BaseException:
                self._leaving.clear()
                raise
            self._leaving = set(chosen)
        self._take_off(chosen)
        return True

    def _take_off(self, names: Sequence[str]) -> None:
        try:
            for name in names:
                try:
                    self._tuner.discard(name)
                except BaseException:  # an interrupt: to the end, since half an adapter would compute something else
                    if name in self._tuner.placed:
                        self._tuner.discard(name)
                    raise
                self._counters.evictions += 1
        finally:
            with self._lock:
                self._leaving.clear()

    def _wait_until_unused(self, name: str) -> None:
        self._leaving.add(name)
        try:
            while name in self._uses:
                self._wait([name])
        except BaseException:
            self._leaving.discard(name)
            raise

    def _wait(self, used: Sequence[str]) -> None:
        """Wait a moment for calls that use these adapters.

        Raises:
            NoRoomError: all of these calls wait themselves.
        """
        waiting = {use.thread for use in self._waiting}
        if self._uses.threads(used) <= {*waiting, threading.get_ident()}:
            raise NoRoomError(
                f"the adapters {list(used)} would have to go, and are used by calls that wait for others themselves: calls "
                "inside of calls need more room. Raise `model.adapter_store.limits`."
            )
        self._lock.wait(_TICK)

    # -- host memory

    def _fetch(self, names: Sequence[str]) -> dict[str, _Fetched]:
        """Those that are not on the model, in host memory, as far as anything is kept there. No other call waits for this."""
        if not self._limits.keeps_in_host:
            return {}
        missing = [name for name in names if name not in self._device.resident]
        found = ((name, self._in_host(name)) for name in missing)
        return {name: fetched for name, fetched in found if fetched is not None}

    def _in_host(self, name: str) -> _Fetched | None:
        """The adapter in host memory, read where it is not there; of several threads one reads it. None: it is deleted."""
        while True:
            mine: Future[InHost | None] = Future()
            started = time.perf_counter()
            try:
                with self._lock:
                    kept, entry = self._host.find(name), self._entries.get(name)
                    if kept is not None or entry is None:
                        return None if kept is None else _Fetched(kept, 0.0, True)
                    reading = self._reading.get(name, mine)
                    if reading.done():  # left behind by an interrupt
                        reading = mine
                    self._reading[name] = reading
                if reading is mine:
                    held = InHost.read(entry.open(), self._pins_memory)
                    mine.set_result(held)
                    self._keep_in_host(name, entry, held)
                    return _Fetched(held, time.perf_counter() - started, False)
            finally:
                self._end_reading(name, mine)
            found = reading.result()
            if found is not None:  # else the other thread failed, and this one finds out why
                return _Fetched(found, 0.0, False)

    def _keep_in_host(self, name: str, entry: Entry, held: InHost) -> None:
        with self._lock:
            if self._entries.get(name) is entry:  # else another one was registered meanwhile
                self._host.put(name, held)
                self._counters.host_evictions += self._host.trim(self._limits)

    def _end_reading(self, name: str, mine: Future[InHost | None]) -> None:
        with self._lock:
            if self._reading.get(name) is mine:
                del self._reading[name]
        if not mine.done():
            mine.set_result(None)

    @property
    def _pins_memory(self) -> bool:
        """Whether some of the base is on a GPU, to which memory that is pinned is copied faster."""
        first = next(self._tuner.model.parameters(), None)
        return first is not None and first.is_cuda


def _mend(name: str, why: str) -> str:
    if why == "pinned":
        return f" Call `unpin({name!r})` first."
    trained = ("in training", "changed since it was loaded")
    return f" Save it, then call `delete_adapter({name!r})`." if why in trained else ""
