"""Which slot each row of a batch uses, in a tensor: what compiled graphs and CUDA graphs read in the place of names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from splice.selection import Rows

# The slot of each name, -1 for the base; it raises a ValueError where there is none.
FindSeats = Callable[[Sequence[str]], list[int]]


class SlotRows:
    """One adapter for every row of a batch, each in a slot: to be given as `adapter_names`, made by `PeftModel.slot_rows`.

    A graph that was compiled or captured with it holds for all adapters that are ever in the slots: `assign` others, and call
    or replay it. It gives no gradients.
    """

    # The slot of each row, (rows,), -1 for rows of the base: always the same tensor, on the device of the slots.
    numbers: torch.Tensor

    def __init__(self, owner: object, names: Sequence[str], find: FindSeats, device: torch.device) -> None:
        """For these names.

        Args:
            owner: whose calls they are for.
            names: one for each row, "__base__" for none.
            find: tells their slots.
            device: of the slots.

        Raises:
            ValueError: there are no names, or one of them is of no adapter that lies in a slot.
        """
        self._owner, self._find = owner, find
        # Why the tensor means other adapters than its names; empty where it does not.
        self._stale = ""
        with torch.inference_mode(False):
            self.numbers = torch.empty(len(names), dtype=torch.long, device=device)
        self.assign(names)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapter of each row."""
        return self._names

    @torch.inference_mode(False)
    def assign(self, names: Sequence[str]) -> None:
        """Give the rows these adapters from now on; whether all of each lies in its slot is checked now.

        Raises:
            ValueError: there are more or fewer rows, or one of the names is of no adapter that lies in a slot.
        """
        if isinstance(names, str) or not names or len(names) != len(self.numbers):
            raise ValueError(f"these are {len(self.numbers)} rows, and each needs a name, at least one: got {names!r}")
        numbers = self._find(names)
        self.numbers.copy_(torch.tensor(numbers))
        self._names = tuple(names)
        # Two, since `generate` may repeat rows; both read the one tensor.
        self._plain = Rows(self._names, False, seats=self.numbers, by_seats=True)
        self._repeated = Rows(self._names, True, seats=self.numbers, by_seats=True)
        self._stale = ""

    def leave(self, name: str) -> None:
        """Be told that an adapter leaves its slot, which may be another one's soon."""
        if name in self._names:
            self._stale = f"adapter {name!r} has left its slot since"

    def rows(self, owner: object, may_repeat: bool) -> Rows:
        """The rows of one call of `owner`, which may repeat them.

        Raises:
            ValueError: an adapter has left its slot, or the slots are another one's.
        """
        if owner is not self._owner:
            raise ValueError("these are rows of another model: each has slots of its own, `model.slot_rows([...])`")
        if self._stale:
            raise ValueError(f"{self._stale}: give these rows other adapters, `rows.assign([...])`")
        return self._repeated if may_repeat else self._plain

    def __repr__(self) -> str:
        return f"SlotRows({list(self._names)})"
