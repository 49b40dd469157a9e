"""Which factors of a mixed batch lie at equal distances, in slots or as loaded: batched products read them there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from splice.kinds.arena import Chunk, place_of
from splice.kinds.stack import Stack

# Factors of many places, (places, r, in) and (places, out, r).
Stacked = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Bundle:
    """Updates whose factors lie at equal distances.

    Attributes:
        numbers: which updates, as numbers in the whole list.
        places: the place of each of these.
        factors: gives those of all places, also of others. Those of a stack are not kept here: tensors may move away, and
            the memory of a stack is to be free then.
        ways: how their rows are computed, by the number of vectors of each row; filled by whoever computes.
    """

    numbers: tuple[int, ...]
    places: tuple[int, ...]
    factors: Callable[[], Stacked]
    ways: dict[int, object] = field(default_factory=dict)


class Bundles:
    """The bundles of some updates of one layer, and what tells that they are so still."""

    def __init__(self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], stack: Stack | None) -> None:
        """For updates with these factors.

        Args:
            a: the factors A (r, in).
            b: the factors B (out, r).
            stack: in which some of them may lie.
        """
        self._stack, self._addresses, self._sizes = stack, _addresses(a, b), _sizes(a, b)
        found: dict[object, tuple[list[int], list[int], _Where]] = {}
        alone = []
        for index, pair in enumerate(zip(a, b)):
            where = _in_stack(stack, *pair) or _in_arena(*pair)
            if where is None:
                alone.append(index)
            else:
                numbers, places, _ = found.setdefault(where.common, ([], [], where))
                numbers.append(index)
                places.append(where.place)
        # Those that lie elsewhere, as numbers in the list.
        self.alone = tuple(alone)
        self.found = [
            Bundle(tuple(numbers), tuple(places), where.reader()) for numbers, places, where in found.values()
        ]

    def hold(self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], stack: Stack | None) -> bool:
        """Whether these factors lie where those did; arguments as above.

        It is asked at every call: `.to`, FSDP, `load_state_dict` and whoever sets `.data` move tensors, and tell nobody.
        """
        return stack is self._stack and _addresses(a, b) == self._addresses and _sizes(a, b) == self._sizes


class _Where(NamedTuple):
    """The place of an update's factors."""

    # What all that lie at equal distances with them have in common.
    common: object
    # The number of the place.
    place: int
    # Makes the `factors` of a bundle.
    reader: Callable[[], Callable[[], Stacked]]


def _addresses(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> list[int]:
    return [*map(torch.Tensor.data_ptr, a), *map(torch.Tensor.data_ptr, b)]


def _sizes(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> list[int]:
    # Which tell the ranks, as the layer's features are what they are; shapes take twice as long to ask for.
    return [*map(torch.Tensor.numel, a), *map(torch.Tensor.numel, b)]


def _in_stack(stack: Stack | None, a: torch.Tensor, b: torch.Tensor) -> _Where | None:
    if stack is None or not (_is_part(a, stack.a, 0) and _is_part(b, stack.b, 1)):
        return None
    place = _place(a, stack.a)
    return None if place < 0 or _place(b, stack.b) != place else _Where(None, place, lambda: lambda: (stack.a, stack.b))


def _is_part(tensor: torch.Tensor, stacked: torch.Tensor, dim: int) -> bool:
    """Whether a tensor may be one of those that are stacked, or the first part of one, with less of this dimension."""
    if not _is_plain(tensor) or tensor.dtype is not stacked.dtype or tensor.device != stacked.device:
        return False
    rank, room = tensor.shape[dim], stacked.shape[dim + 1]
    rest = tensor.shape[1 - dim] == stacked.shape[2 - dim]
    return rest and rank <= room and tensor.stride() == stacked.stride()[1:]


def _place(tensor: torch.Tensor, stacked: torch.Tensor) -> int:
    """Which of those that are stacked begins where the tensor does; -1 where none does."""
    place, rest = divmod(tensor.data_ptr() - stacked.data_ptr(), stacked.stride(0) * stacked.element_size())
    return -1 if rest or place >= len(stacked) else place


def _in_arena(a: torch.Tensor, b: torch.Tensor) -> _Where | None:
    if not all(_is_plain(t) and t.device.type == "cpu" and t.is_contiguous() for t in (a, b)):
        return None
    at_a, at_b = place_of(a.data_ptr()), place_of(b.data_ptr())
    if at_a is None or at_b is None or at_a[:2] != at_b[:2]:
        return None
    pieces = (at_a.offset, a.shape, a.dtype), (at_b.offset, b.shape, b.dtype)
    return _Where((at_a.chunk, pieces), at_a.number, partial(_reader, at_a.chunk, *pieces))


_PieceOf = tuple[int, torch.Size, torch.dtype]


def _reader(chunk: Chunk, a: _PieceOf, b: _PieceOf) -> Callable[[], Stacked]:
    # Kept: a chunk whose blocks have been given back is address space, and no memory.
    factors = chunk.of_all_blocks(*a), chunk.of_all_blocks(*b)
    return lambda: factors


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (nn.Parameter, torch.Tensor)
