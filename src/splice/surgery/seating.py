"""Rows of a batch by the slots of their adapters, for graphs that must not depend on names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache

import torch

from splice.selection import BASE, Rows
from splice.surgery.slot_rows import SlotRows
from splice.surgery.stacks import Stacks
from splice.surgery.tuner import Tuner


def slot_rows(tuner: Tuner, names: Sequence[str]) -> SlotRows:
    """As `PeftModel.slot_rows`."""
    reserved = tuner.reserved_slots

    def find(chosen: Sequence[str]) -> list[int]:
        found = seats_of(tuner, chosen)
        tuner.rows(chosen, False)  # refuses layers in experts, whose rows nobody can tell
        return found

    made = SlotRows(tuner, names, find, _device(reserved))
    if reserved is not None:
        _keep_places(reserved)
        reserved.readers.add(made)
    return made


def note_seats(tuner: Tuner, rows: Rows) -> Rows:
    """`rows` with their `seats`, where all their adapters lie in slots and something may be compiled."""
    # Nothing is compiled before that module is there, and then nobody pays for looking. A graph that is made of this call has
    # the names in it, and nothing to gain.
    if tuner.reserved_slots is None or torch.is_grad_enabled() or "torch._dynamo" not in sys.modules:
        return rows
    if torch.compiler.is_compiling():
        return rows
    try:
        numbers = seats_of(tuner, rows.names)
    except ValueError:  # the layers find the others by their names
        return rows
    _keep_places(tuner.reserved_slots)
    return Rows(rows.names, rows.may_repeat, seats=_tensor(tuple(numbers), _device(tuner.reserved_slots)))


def seats_of(tuner: Tuner, names: Sequence[str]) -> list[int]:
    """The slot of each adapter, all of whose layers lie there now; -1 for the base.

    Raises:
        ValueError: there are no slots, or an adapter lies elsewhere, be it in part.
    """
    reserved = tuner.reserved_slots
    if reserved is None:
        raise ValueError("no slots are reserved: `model.slots(count=32, rank=16)` first")
    found = {BASE: -1}
    for name in names:
        if name not in found:
            tuner.check_known([name])
            found[name], why = reserved.seat(name, tuner.placed[name])
            hooked = next((p for p in tuner.placed[name] if not why and tuner.adapted[p].splice_host.hooked), None)
            if hooked is not None:
                why = f"{hooked}: somebody has hooked the modules that hold its tensors"
            if why:
                raise ValueError(
                    f"adapter {name!r} does not lie in a slot ({why}). Rows by slots need adapters that do, with all their "
                    "tensors; `model.slots(count, rank)` moves those in that have room, and names go for any adapter."
                )
    return [found[name] for name in names]


def _device(reserved: Stacks | None) -> torch.device:
    first = None if reserved is None else next(iter(reserved.of_layer.values()), None)
    return torch.device("cpu") if first is None else first.a.device


def _keep_places(reserved: Stacks) -> None:
    """Let captured graphs read the stacks where they are: otherwise each call would copy all of them."""
    for stack in reserved.of_layer.values():
        if not stack.stays_in_place:
            for tensor in stack.tensors:
                torch._dynamo.mark_static_address(tensor, guard=False)
            stack.stays_in_place = True


# Of the last calls, as the groups of a batch are.
@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _tensor(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=device)
