"""Memory for the tensors of adapters that are alike: at equal distances, so that batched products read many of them there.

Every tensor has a storage of its own, as any other has; only its place is chosen. The memory of an adapter is given back when
the last of its tensors goes, whoever holds it.
"""

from __future__ import annotations

import math
import mmap
import sys
import weakref
from bisect import bisect_right
from functools import partial
from heapq import heappop, heappush
from threading import RLock
from typing import NamedTuple

import torch

# What tensors begin at multiples of, in bytes: as those that torch gives memory to.
_ALIGNED = 64
# How many blocks a chunk has at least and at most, and of how many bytes it is in between. What nobody has written to is
# address space, and no memory.
_LEAST, _MOST, _BYTES = 4, 64, 1 << 28
# Of so many bytes a block is small.
_SMALL = 1 << 25


# Shape and dtype of each tensor of an adapter, in their order.
Layout = tuple[tuple[torch.Size, torch.dtype], ...]


class Place(NamedTuple):
    """Where a tensor lies in a chunk."""

    # The chunk.
    chunk: Chunk
    # The number of the block, from 0.
    number: int
    # Where in the block, in bytes.
    offset: int


class Piece(NamedTuple):
    """Where one tensor lies in each block."""

    # Its shape.
    shape: torch.Size
    # Its dtype.
    dtype: torch.dtype
    # How many elements it has.
    numel: int
    # Where it begins, in bytes.
    offset: int


class Chunk:
    """Blocks of one size that lie one behind another."""

    def __init__(self, size: int, count: int) -> None:
        """Of address space: a block is memory from when it is written to until it is given back.

        Args:
            size: of a block, in bytes, a multiple of the system's page.
            count: how many blocks.

        Raises:
            OSError: there is no room for them.
        """
        self.size, self.count = size, count
        # Of this process alone: one that is forked from it gets copies of what either of them writes.
        self._memory = mmap.mmap(-1, size * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with torch.inference_mode(False):
            # All of it, (count * size).
            self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.start = self._bytes.data_ptr()

    def block(self, number: int) -> memoryview:
        """The memory of one block."""
        return memoryview(self._memory)[number * self.size : (number + 1) * self.size]

    def give_back(self, number: int) -> None:
        """Give the memory of a block to the system."""
        self._memory.madvise(mmap.MADV_DONTNEED, number * self.size, self.size)

    def of_all_blocks(self, offset: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The contiguous matrix of this shape that begins there in each of the blocks, (blocks, *shape), to be read."""
        height, width = shape
        size = dtype.itemsize
        return self._bytes.view(dtype).as_strided(
            (self.count, height, width), (self.size // size, width, 1), offset // size
        )


class Arena:
    """Memory for adapters whose tensors have the same shapes and dtypes in the same order: a block for each."""

    def __init__(self, layout: Layout) -> None:
        """Without any memory, for blocks of these tensors."""
        self._pieces, offset = list[Piece](), 0
        for shape, dtype in layout:
            numel = math.prod(shape)
            self._pieces.append(Piece(shape, dtype, numel, offset))
            offset += _up(numel * dtype.itemsize, _ALIGNED)
        self._size = _up(offset, mmap.PAGESIZE)
        self._chunks: list[Chunk] = []
        # A heap of the blocks that nobody uses: the number of the chunk, and the block's. The lowest are taken first, so that
        # those in use are neighbours.
        self._free: list[tuple[int, int]] = []
        # The block that was given back last, where it is small: whoever loads and deletes in turns gets its memory as it is,
        # and the system need not take it and give it again, page by page.
        self._kept: list[tuple[int, int]] = []

    def tensors(self) -> list[torch.Tensor] | None:
        """Memory for all tensors of an adapter, in their order, with any values; None where there is no room."""
        place = self._take()
        if place is None:
            return None
        block = self._chunks[place[0]].block(place[1])
        # It keeps this arena as long as a block is in use. Not at the end of the program: tensors may be in use for longer
        # than finalizers are waited with.
        weakref.finalize(block, self._give_back, place).atexit = False
        with torch.inference_mode(False):
            return [
                torch.frombuffer(block, dtype=dtype, count=numel, offset=offset).view(shape)
                for shape, dtype, numel, offset in self._pieces
            ]

    def _take(self) -> tuple[int, int] | None:
        """A block that nobody uses; None where there is no room for one."""
        # Tried and not asked for: another thread may be giving one back, which then is in neither list for a moment.
        while True:
            for take in (self._kept.pop, partial(heappop, self._free)):
                try:
                    return take()
                except IndexError:
                    continue
            if not self._grow():
                return None

    def _grow(self) -> bool:
        """Make room; whether there is any."""
        try:
            chunk = Chunk(self._size, min(max(_LEAST, _BYTES // self._size), _MOST))
        except (OSError, ValueError, OverflowError):  # the address space is limited
            return False
        self._chunks.append(chunk)
        _note(chunk)
        for number in range(chunk.count):
            heappush(self._free, (len(self._chunks) - 1, number))
        return True

    def _give_back(self, place: tuple[int, int]) -> None:
        # In whatever thread, at any time: each step is one that nothing comes into the middle of.
        self._kept.append(place)
        if len(self._kept) > 1 or self._size > _SMALL:
            try:
                chunk, number = last = self._kept.pop(0)
            except IndexError:  # a load has just taken it
                return
            self._chunks[chunk].give_back(number)
            heappush(self._free, last)


_lock = RLock()
# By their layouts, as long as one of their blocks is in use.
_arenas = weakref.WeakValueDictionary[Layout, Arena]()
# By their addresses.
_chunks = weakref.WeakValueDictionary[int, Chunk]()
# These addresses in order; some chunks may be gone.
_starts: list[int] = []


def side_by_side(layout: Layout) -> list[torch.Tensor] | None:
    """Memory on the CPU for tensors of these shapes and dtypes, at an equal distance from others that got it for the same.

    None where there is none: on systems that do not take back part of a mapping, or for want of room.
    """
    if sys.platform != "linux" or not layout:
        return None
    with _lock:
        arena = _arenas.get(layout)
        if arena is None:
            arena = _arenas[layout] = Arena(layout)
        return arena.tensors()


def place_of(address: int) -> Place | None:
    """Where the tensor at an address lies; None where it is in no chunk."""
    starts = _starts
    index = bisect_right(starts, address) - 1
    chunk = _chunks.get(starts[index]) if index >= 0 else None
    if chunk is None or address >= chunk.start + chunk.size * chunk.count:
        return None
    number, offset = divmod(address - chunk.start, chunk.size)
    return Place(chunk, number, offset)


def _note(chunk: Chunk) -> None:
    global _starts
    _chunks[chunk.start] = chunk
    _starts = sorted(_chunks)


def _up(size: int, to: int) -> int:
    """The next multiple."""
    return -(-size // to) * to
