"""Reserving slots: stacked memory on each layer for the factors of many adapters, so that mixed batches read it in one go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from splice.errors import sized
from splice.surgery.stacks import Stacks
from splice.surgery.tuner import Tuner


class SlotsReport(NamedTuple):
    """`str(report)`: "slots: 32 of 64 taken, 160.2 MB", with a line for each adapter outside.

    Attributes:
        total: how many slots there are.
        rank: the largest rank that has room in one.
        numbers: adapter name -> its slot.
        outside: adapter name -> why it, or a part of it, is in no slot. It works as it does without slots.
        nbytes: bytes of all stacks so far; those of a layer are made when its first adapter comes.
    """

    total: int
    rank: int
    numbers: Mapping[str, int]
    outside: Mapping[str, str]
    nbytes: int

    def __str__(self) -> str:
        line = f"slots: {len(self.numbers)} of {self.total} taken, {sized(self.nbytes)}"
        return "\n".join((line, *(f"  outside: {name!r}, {why}" for name, why in self.outside.items())))


def slots(tuner: Tuner, count: int | None, rank: int | None) -> SlotsReport:
    """Reserve slots in the place of those that there are; arguments as in `PeftModel.slots`.

    Raises:
        ValueError: `count` or `rank` is too small, or one of them is missing.
    """
    if count is None and rank is None:
        return _report(tuner)
    if count is None or count < 0 or (count > 0 and (rank is None or rank < 1)):
        raise ValueError(
            f"slots need a count of at least 0 and a rank of at least 1, got {count} and {rank}: "
            "`model.slots(count=32, rank=16)`"
        )
    _give_up(tuner)
    if count and rank is not None:
        tuner.reserved_slots = Stacks(count, rank)
        try:
            for name in tuner.placed:
                tuner.take_slot(name)
        except BaseException:  # no memory for all stacks, or an interrupt
            _give_up(tuner)
            raise
    return _report(tuner)


def _report(tuner: Tuner) -> SlotsReport:
    """What is in the slots now."""
    reserved = tuner.reserved_slots
    if reserved is None:
        return SlotsReport(0, 0, {}, {}, 0)
    return SlotsReport(reserved.count, reserved.rank, dict(reserved.numbers), dict(reserved.outside), reserved.nbytes)


def _give_up(tuner: Tuner) -> None:
    """Let every adapter have its tensors in memory of their own again."""
    reserved, tuner.reserved_slots = tuner.reserved_slots, None
    if reserved is None:
        return
    for host in tuner.hosts.values():
        host.stack = None
        host.row_plan = None  # it would keep the stack
    reserved.give_up()
