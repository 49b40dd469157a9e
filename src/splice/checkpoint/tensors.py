"""A checkpoint: its entries, and a way to read each tensor straight into memory of its own."""

from __future__ import annotations

import ctypes
import math
import os
import pickle
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from splice.base.dtypes import FLOAT8
from splice.base.sharding import Part, is_divided, part_in, whole
from splice.checkpoint.foreign import LFS_START, lfs_pointer
from splice.checkpoint.header import Entry, read_header
from splice.checkpoint.reading import Reading
from splice.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    **FLOAT8,
}  # fmt: skip
# Buffers that one system call fills at most (IOV_MAX of Linux and macOS).
_IOV_MAX = 1024
# Bytes that are compared at a time.
_PIECE = 1 << 19
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Weights(Protocol):
    """The tensors of a checkpoint: what there is, known before anything is read."""

    @property
    def place(self) -> str:
        """Where they are, for messages."""
        ...

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Dtype and shape of every tensor."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """What stands in the file beside the tensors."""
        ...

    @property
    def lends(self) -> bool:
        """Whether what `read` gives may be memory that is kept here: whoever keeps it too has to copy it."""
        ...

    def read(self, names: Sequence[str], into: Mapping[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
        """These tensors, on the CPU and as they were stored, each in memory that it shares with nothing unless it is lent.

        Args:
            names: of the tensors.
            into: tensors that some of them may be read into, where these are stored alike; others are given their own memory.
        """
        ...

    def read_part(self, name: str, part: Part) -> torch.Tensor:
        """The part of one tensor, likewise; no more is read of a file than that."""
        ...

    def says(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether one of them is this `tensor`, which is on the CPU, to the last bit."""
        ...


class SafetensorsFile:
    """Tensors in a safetensors file. The file is read, never mapped: it may be changed or deleted afterwards."""

    lends = False

    # Hence not `safetensors.torch.load_file`, which maps it: a file that is cut off later kills the process (SIGBUS), and
    # one that is overwritten changes the model.

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder, not a file")
        # Opened once, and read through this descriptor alone: a save that gives the file's name to another one meanwhile
        # changes nothing of what is read here.
        self.descriptor = os.open(path, os.O_RDONLY | _BINARY)
        weakref.finalize(self, os.close, self.descriptor)
        header = read_header(path, self.descriptor)
        self.path = path
        self.place = str(path)
        self.entries = header.entries
        self.metadata = header.metadata

    def read(self, names: Sequence[str], into: Mapping[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
        reading = self.begin_to_read(names, into)
        reading.wait()
        return reading.tensors

    def begin_to_read(self, names: Sequence[str], into: Mapping[str, torch.Tensor] | None = None) -> Reading:
        """The same, while the program goes on; where that is not worth a thread, when they are waited for."""
        entries = [self.entries[name] for name in names]
        given = {name: tensor for name, tensor in (into or {}).items() if _holds(tensor, self.entries[name])}
        tensors = [
            given[name] if name in given else torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
            for name, entry in zip(names, entries)
        ]
        # Tensors that lie behind one another are one system call. Most adapters have hundreds of small ones.
        in_file_order = sorted(range(len(names)), key=lambda i: entries[i].offset)
        runs = [
            (_memory_of_all([tensors[i] for i in run]), entries[run[0]].offset) for run in _runs(in_file_order, entries)
        ]

        def fill() -> None:
            for memory, offset in runs:
                self._fill_memory(memory, offset)

        return Reading(tensors, fill, sum(entry.size for entry in entries))

    def read_part(self, name: str, part: Part) -> torch.Tensor:
        entry = self.entries[name]
        tensor = torch.empty(part.shape, dtype=DTYPES[entry.dtype])
        if tensor.numel():
            memory = memory_of(tensor)
            length, starts = _stretches(entry.shape, part)
            size = length * tensor.element_size()
            for index, start in enumerate(starts):
                place = entry.offset + start * tensor.element_size()
                self._fill_memory([memory[index * size : (index + 1) * size]], place)
        return tensor

    def read_rows(self, name: str, start: int, into: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix from `start` on, as many as `into` (rows, columns) has, which they are read into.

        `into` is contiguous, of the dtype that is stored.
        """
        self._fill([into], self.entries[name].offset + start * into.shape[1] * into.element_size())
        return into

    def says(self, name: str, tensor: torch.Tensor) -> bool:
        entry = self.entries[name]
        if tensor.shape != entry.shape or tensor.dtype is not DTYPES[entry.dtype]:
            return False
        # Piece by piece, through memory that stays in the processor's cache: as large tensors are repeated by every layer
        # of a network, reading them into memory of their own would take longer than all else of a load.
        own = tensor.contiguous().view(-1).view(torch.uint8)
        room = torch.empty(min(_PIECE, len(own)), dtype=torch.uint8)
        for start in range(0, len(own), _PIECE):
            piece = own[start : start + _PIECE]
            found = room[: len(piece)]
            self._fill([found], entry.offset + start)
            if not torch.equal(_in_words(found), _in_words(piece)):
                return False
        return True

    def _fill(self, tensors: Sequence[torch.Tensor], offset: int) -> None:
        """Read a run of tensors that lie behind one another, straight into their own memory."""
        self._fill_memory(_memory_of_all(tensors), offset)

    def _fill_memory(self, targets: list[memoryview], offset: int) -> None:
        wanted = sum(map(len, targets))
        while wanted:
            count = _read_into(self.descriptor, targets, offset)
            if count == 0:
                raise CheckpointError(f"{self.path} was cut off while it was read")
            offset, wanted = offset + count, wanted - count
            targets = _behind(targets, count) if wanted else []


def _in_words(data: torch.Tensor) -> torch.Tensor:
    """The same bytes, eight at a time where that is possible: so they are compared faster."""
    return data if len(data) % 8 else data.view(torch.int64)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, to be read or written as bytes; it is only there as long as the tensor is."""
    return _memory_at(tensor.data_ptr(), tensor.nbytes)


def _memory_of_all(tensors: Sequence[torch.Tensor]) -> list[memoryview]:
    """The memory of contiguous tensors, in their order; where one begins at the end of another, they are one stretch."""
    stretches: list[list[int]] = []
    end = 0
    for tensor in tensors:
        begin, size = tensor.data_ptr(), tensor.nbytes
        if stretches and begin == end:
            stretches[-1][1] += size
        else:
            stretches.append([begin, size])
        end = begin + size
    return [_memory_at(begin, size) for begin, size in stretches]


def _memory_at(address: int, size: int) -> memoryview:
    # By address: `tensor.numpy()` would need numpy, and knows no bfloat16.
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _stretches(shape: Sequence[int], part: Part) -> tuple[int, list[int]]:
    """The stretches of memory that a part of a tensor of this shape consists of, in elements: their length, and starts."""
    # Dimensions from the last one on that the part has all of, and the one before these, are one stretch.
    inner = len(shape)
    while inner and part.shape[inner - 1] == shape[inner - 1]:
        inner -= 1
    inner = max(0, inner - 1)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = sum(begin * stride for begin, stride in zip(part.offset, strides))
    starts = [first]
    for dim in range(inner):
        starts = [start + index * strides[dim] for start in starts for index in range(part.shape[dim])]
    return math.prod(part.shape[inner:]), starts


if sys.platform == "win32":
    _BINARY = os.O_BINARY

    def _read_into(descriptor: int, targets: list[memoryview], offset: int) -> int:
        """Fill the first buffer from `offset` on; gives the number of bytes. There is no call that fills several."""
        os.lseek(descriptor, offset, os.SEEK_SET)
        found = os.read(descriptor, len(targets[0]))
        targets[0][: len(found)] = found
        return len(found)

else:
    _BINARY = 0

    def _read_into(descriptor: int, targets: list[memoryview], offset: int) -> int:
        """Fill the buffers one after the other from `offset` on; gives the number of bytes, which may be fewer."""
        return os.preadv(descriptor, targets, offset)


def _behind(targets: list[memoryview], count: int) -> list[memoryview]:
    """What of the buffers is left to fill after their first `count` bytes: a system call may stop anywhere."""
    first = 0
    while count >= len(targets[first]):
        count -= len(targets[first])
        first += 1
    return [targets[first][count:], *targets[first + 1 :]]


def _runs(order: Sequence[int], entries: Sequence[Entry]) -> Iterator[list[int]]:
    """Indices of entries that lie behind one another in the file, as many as one system call takes."""
    run: list[int] = []
    for index in order:
        if not entries[index].size:
            continue
        last = entries[run[-1]] if run else None
        if last is not None and (last.offset + last.size != entries[index].offset or len(run) == _IOV_MAX):
            yield run
            run = []
        run.append(index)
    if run:
        yield run


class TensorsInMemory:
    """Tensors that are in memory already: of a `.bin` file, or given by the caller. Each is copied when it is read."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], place: str, hand_over: bool = False, lends: bool = False
    ) -> None:
        self.place = place
        self.metadata: Mapping[str, str] = {}
        self.tensors = tensors
        # Whether nobody else has these tensors, so that they need no copy. True of those that were just unpickled.
        self.hand_over = hand_over
        self.lends = lends
        self.entries = {
            name: Entry(DTYPE_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape), 0, t.numel() * t.element_size())
            for name, t in tensors.items()
        }

        # Memory that was handed over: a second tensor in it gets its own.
        self.handed: set[int] = set()

    def read(self, names: Sequence[str], into: Mapping[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
        given = {name: tensor for name, tensor in (into or {}).items() if _holds(tensor, self.entries[name])}
        found = []
        for name in names:
            tensor = self.tensors[name].detach()
            if name in given and not is_divided(tensor):
                found.append(given[name].copy_(tensor))
            else:
                found.append(tensor if self.lends else self._owned(tensor))
        return found

    def read_part(self, name: str, part: Part) -> torch.Tensor:
        return part_in(whole(self.tensors[name].detach()), part)

    def says(self, name: str, tensor: torch.Tensor) -> bool:
        own = whole(self.tensors[name].detach()).cpu()
        return own.dtype is tensor.dtype and torch.equal(own, tensor)

    def _owned(self, tensor: torch.Tensor) -> torch.Tensor:
        if is_divided(tensor):
            return tensor.clone()
        # A tensor that is part of a larger memory would keep all of it alive.
        storage = tensor.untyped_storage()
        owns_memory = (
            storage.nbytes() == tensor.nbytes and tensor.is_contiguous() and storage.data_ptr() not in self.handed
        )
        self.handed.add(storage.data_ptr())
        return tensor if self.hand_over and owns_memory else tensor.clone(memory_format=torch.contiguous_format)


def _holds(tensor: torch.Tensor, entry: Entry) -> bool:
    """Whether the bytes of an entry can be read straight into the memory of a tensor."""
    alike = tensor.shape == entry.shape and tensor.dtype is DTYPES[entry.dtype]
    return alike and tensor.device.type == "cpu" and tensor.is_contiguous()


def begin_to_read(weights: Weights, names: Sequence[str], into: Mapping[str, torch.Tensor] | None) -> Reading:
    """`weights.read`, while the program goes on where they are in a file as they are."""
    if isinstance(weights, SafetensorsFile):
        return weights.begin_to_read(names, into)
    return Reading(weights.read(names, into), lambda: None, 0, weights.lends)


def open_weights(path: Path) -> Weights:
    """The tensors in `path`, a `.safetensors` or a `.bin` file.

    Raises:
        CheckpointError: the file is damaged.
        pickle.UnpicklingError: a `.bin` file holds anything but tensors; nothing in it has been run.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    return TensorsInMemory(_unpickle(path), str(path), hand_over=True)


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a file")
    with open(path, "rb") as file:
        if file.read(len(LFS_START)) == LFS_START:
            raise CheckpointError(lfs_pointer(str(path)))
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(
            f"{path} holds something other than tensors, and nothing of it was run. Ask its author for a "
            f"safetensors file. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # what is no pickle at all fails in a dozen ways
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path} holds a {type(tensors).__name__}; an adapter is a dict of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path} holds a {type(tensor).__name__} under {name!r}; an adapter is a dict of tensors"
            )
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise CheckpointError(
                f"{path} holds {name!r} as a tensor that is sparse, quantised or without values; an adapter has plain ones"
            )
    return tensors
