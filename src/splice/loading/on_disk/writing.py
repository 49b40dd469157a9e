"""Writing one file of a merged model: what stays is copied by the system, what changes is worked out and put in its place."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import RawIOBase
from pathlib import Path

import torch

from splice.base.added_product import AddedProduct
from splice.checkpoint.tensors import DTYPES, SafetensorsFile, memory_of
from splice.errors import CheckpointError
from splice.loading.on_disk.changes import Changes
from splice.loading.on_disk.layout import Piece, Shard
from splice.loading.on_disk.streaming import Streamed, put, stream, threads_for_each_sum

# Bytes that are copied at once: often enough to show progress.
_STEP = 1 << 26


def write_shard(
    files: Mapping[str, SafetensorsFile],
    target: Path,
    shard: Shard,
    changes: Changes,
    progress: Callable[[int], object],
) -> None:
    """Write the whole file `target`.

    Args:
        files: those of the base, by name.
        target: the new file, which must not have its final name yet.
        shard: what stands in it.
        changes: what works out the tensors that change.
        progress: called with the number of bytes that have been written since the last time.

    Raises:
        OSError: the disk is full, or a file cannot be read.
        CheckpointError: a file of the base was cut off meanwhile.
    """
    with open(target, "wb", buffering=0) as new:
        put(new, memoryview(shard.head), 0)
        progress(len(shard.head))
        for stretch in _copied(shard):
            _copy(files[shard.name], new, stretch, progress)
        by_layer = defaultdict(list)
        by_rows: list[Streamed] = []
        for offset, piece in shard.pieces:
            if piece.is_copied_from(shard.name):
                continue
            product = _product_of(piece, changes)
            if product is not None:
                by_rows.append(Streamed(files[piece.file], new, offset, piece, product))
                continue
            path = None if piece.changed in changes.copies else changes.by_layer.get(piece.changed or "")
            if path is not None:
                by_layer[path].append((offset, piece))
                continue
            _put_tensor(new, _base_or_copy(piece, files, changes).to(piece.dtype), offset)
            progress(piece.size)
        stream(by_rows, progress)
        # While one layer is written, the next one is worked out; not more than that, for the memory it takes. The core that
        # writes is left alone: a thread there would come many times later, and all others wait for it at each small sum.
        with threads_for_each_sum(torch.get_num_threads() - 1), ThreadPoolExecutor(1) as writer:
            before: Future[int] | None = None
            for path, places in by_layer.items():
                ready = _worked_out(path, places, changes)
                if before is not None:
                    progress(before.result())
                before = writer.submit(_put_all, new, ready)
            if before is not None:
                progress(before.result())


def _product_of(piece: Piece, changes: Changes) -> AddedProduct | None:
    """What is added to a weight of the base, where it can be read, summed and written a few rows at a time."""
    path = changes.by_layer.get(piece.changed or "")
    factors = None if path is None or piece.changed in changes.copies else changes.layers[path].product
    if factors is None or piece.source is None or DTYPES[piece.source.dtype] is not piece.dtype:
        return None
    return AddedProduct.of(piece.shape, piece.dtype, factors.b, factors.a, factors.scale)


def _worked_out(path: str, places: list[tuple[int, Piece]], changes: Changes) -> list[tuple[int, torch.Tensor]]:
    tensors, found = changes.layers[path].work_out(), []
    for offset, piece in places:
        assert piece.changed is not None
        tensor = tensors[piece.changed.rpartition(".")[2]]
        assert tuple(tensor.shape) == piece.shape
        found.append((offset, tensor.to(piece.dtype)))
    return found


def _put_all(file: RawIOBase, places: list[tuple[int, torch.Tensor]]) -> int:
    return sum(_put_tensor(file, tensor, offset) for offset, tensor in places)


def _base_or_copy(piece: Piece, files: Mapping[str, SafetensorsFile], changes: Changes) -> torch.Tensor:
    if piece.changed is not None:
        return changes.copies[piece.changed]
    return files[piece.file].read([piece.stored])[0]


def _copied(shard: Shard) -> Iterator[tuple[int, int, int]]:
    """Stretches whose bytes are the base's: where each begins in the base's file, where in the new one, and its length."""
    run: tuple[int, int, int] | None = None
    for offset, piece in shard.pieces:
        if not piece.is_copied_from(shard.name):
            continue
        entry = piece.source
        assert entry is not None
        if run is not None and run[0] + run[2] == entry.offset and run[1] + run[2] == offset:
            run = (run[0], run[1], run[2] + entry.size)
            continue
        if run is not None:
            yield run
        run = (entry.offset, offset, entry.size)
    if run is not None:
        yield run


def _copy(
    old: SafetensorsFile, new: RawIOBase, stretch: tuple[int, int, int], progress: Callable[[int], object]
) -> None:
    begin, offset, size = stretch
    done = 0
    while done < size:
        count = _copy_some(old.descriptor, new, begin + done, offset + done, min(_STEP, size - done))
        if not count:
            raise CheckpointError(f"{old.place} was cut off while it was read")
        done += count
        progress(count)


def _copy_some(old: int, new: RawIOBase, begin: int, offset: int, count: int) -> int:
    # By the system, where it can: without the detour through our memory, and on some file systems without writing at all.
    if sys.platform == "linux":
        with suppress(OSError):  # not between these two file systems
            return os.copy_file_range(old, new.fileno(), count, begin, offset)
    os.lseek(old, begin, os.SEEK_SET)
    data = os.read(old, count)
    put(new, memoryview(data), offset)
    return len(data)


def _put_tensor(file: RawIOBase, tensor: torch.Tensor, offset: int) -> int:
    tensor = tensor.detach().contiguous()
    if tensor.numel():
        put(file, memory_of(tensor), offset)
    return tensor.nbytes
