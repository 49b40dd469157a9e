"""Taking back what an operation has done to a network when it fails, or is interrupted, before its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from splice.base.bare import walk_bare
from splice.surgery.tuner import Tuner

T = TypeVar("T")


class Undo:
    """Remembers how a network is; `run` makes it so again. `modules` are all of its modules by path.

    Use it by `whole_or_undone`; or, where no other thread can come in, as `undo = Undo(tuner)`, then
    `try: ...; return result` / `except BaseException: undo.run(); raise`: whatever cuts the operation short before its
    result is handed out, also a KeyboardInterrupt, leaves no trace.
    """

    def __init__(self, tuner: Tuner) -> None:
        self.tuner = tuner
        # Not the names of all that are there: there may be thousands.
        self.newest, self.was_bare = tuner.last_commit, tuner.is_bare
        self.active, self.enabled = tuner.selection.active, tuner.selection.enabled
        self.awaits = (tuner.awaits_call, tuner.awaits_training)
        self.tuner_training = tuner.training
        # Also for the operation itself, which would otherwise walk the network again.
        self.modules = walk_bare(tuner.model)
        # Module by module, since users put parts of a network into eval mode.
        self.training = [module for module in self.modules.values() if module.training]
        self.steps: list[Callable[[], None]] = []
        self.last: list[Callable[[], None]] = []

    def also(self, step: Callable[[], None]) -> None:
        """Take `step` too, before the rest."""
        self.steps.append(step)

    def at_last(self, step: Callable[[], None]) -> None:
        """Take `step` too, after the rest: it takes back what was done to the network itself, before any adapter came."""
        self.last.append(step)

    def _take_off(self) -> None:
        for name in [name for name, number in self.tuner.order.items() if number > self.newest]:
            if name in self.tuner.placed:
                self.tuner.discard(name)
            self.tuner.order.pop(name, None)  # of a commit that was cut short at its very beginning

    def run(self) -> None:
        for step in self.steps:
            step()
        self._take_off()
        selection = self.tuner.selection
        if (selection.active, selection.enabled) != (self.active, self.enabled):
            selection.enabled = self.enabled
            selection.set(self.active)
        self.tuner.awaits_call, self.tuner.awaits_training = self.awaits
        self.tuner.training = self.tuner_training
        for module in self.modules.values():
            module.training = False
        for module in self.training:
            module.training = True
        for module in self.tuner.added.values():
            module.train(self.tuner_training)
        for host in self.tuner.hosts.values():
            for module in host.added.values():
                module.train(host.base.training)
        if self.was_bare:
            self.tuner.restore_base()
        for step in self.last:
            step()


def whole_or_undone(tuner: Tuner, work: Callable[[Undo], T]) -> T:
    """What `work` gives, which changes the network while nobody else does.

    Whatever cuts it short before its result is handed out leaves no trace, also an interrupt behind its very end.
    """
    # Not in a `with`: between leaving that and handing the result out an interrupt would find all done and nothing undone.
    undo = None
    try:
        tuner.changing.acquire()
        undo = Undo(tuner)
        result = work(undo)
        tuner.changing.release()
        return result
    except BaseException:
        if undo is not None:
            with tuner.changing:
                undo.run()
        with suppress(RuntimeError):  # it is not held any more
            tuner.changing.release()
        raise
