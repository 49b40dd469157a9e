"""Weights that are read, added to and written a few rows at a time, several of them at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import RawIOBase
from typing import NamedTuple

import torch

from splice.base.added_product import AddedProduct
from splice.checkpoint.tensors import SafetensorsFile, memory_of
from splice.loading.on_disk.layout import Piece

# Without calls that read and write at a place, the threads would move the one that the others use.
_SEVERAL = sys.platform != "win32"


class Streamed(NamedTuple):
    """A tensor of the new file that is one of the base with a product added."""

    # Where the base's is.
    old: SafetensorsFile
    # Where it goes.
    new: RawIOBase
    # Its offset there, from the start of the file.
    offset: int
    # What it is called there and here, and what it looks like.
    piece: Piece
    # What is added.
    product: AddedProduct


def stream(tensors: Sequence[Streamed], progress: Callable[[int], object]) -> None:
    """Write them all; `progress` is called with the number of bytes that have been written since the last time.

    Raises:
        OSError: the disk is full.
        CheckpointError: a file of the base was cut off meanwhile.
    """
    if not tensors:
        return
    # A tensor for each core, and not each sum on all of them: so no thread waits for another one.
    cores = torch.get_num_threads() if _SEVERAL else 1
    with threads_for_each_sum(1), ThreadPoolExecutor(cores) as pool:
        waiting = [pool.submit(_stream, each) for each in tensors]
        try:
            for done in waiting:
                progress(done.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the others need not be written any more
            raise


def _stream(tensor: Streamed) -> int:
    """Write one of them; its bytes."""
    old, new, offset, piece, product = tensor
    (height, width), room = piece.shape, product.room()
    values = torch.empty(room.shape, dtype=piece.dtype)
    for rows in product.pieces():
        weight = old.read_rows(piece.stored, rows.start, values[: height - rows.start])
        weight.copy_(product.add(rows, weight, room))
        put(new, memory_of(weight), offset + rows.start * width * piece.dtype.itemsize)
    return piece.size


@contextmanager
def threads_for_each_sum(count: int) -> Iterator[None]:
    """Inside, torch splits a sum among so many threads, at least one."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def put(file: RawIOBase, data: memoryview, offset: int) -> None:
    """Write all of this at `offset` from the start of the file; in several threads at once, where the system lets them."""
    done = 0
    while done < len(data):
        if _SEVERAL:
            done += os.pwrite(file.fileno(), data[done:], offset + done)
        else:
            file.seek(offset + done)
            done += file.write(data[done:]) or 0
