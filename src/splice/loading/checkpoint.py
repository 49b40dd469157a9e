"""A checkpoint: its entries, and a way to read each tensor straight into memory of its own."""

from __future__ import annotations

import ctypes
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from splice.errors import CheckpointError
from splice.loading.header import Entry, read_header

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorReader(Protocol):
    """Gives out tensors that share memory with nothing else."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor of this name, on the CPU and as it was stored."""
        ...


class Weights(Protocol):
    """The tensors of a checkpoint: what there is, known before anything is read."""

    place: str
    entries: Mapping[str, Entry]

    def reader(self) -> Iterator[TensorReader]:
        """Context manager inside which tensors can be read."""
        ...


class SafetensorsFile:
    """Tensors in a safetensors file. The file is read, never mapped: it may be changed or deleted afterwards."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.path = path
        self.place = str(path)
        self.entries = header.entries
        self.metadata = header.metadata

    @contextmanager
    def reader(self) -> Iterator[_FileReader]:
        descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            yield _FileReader(descriptor, self)
        finally:
            os.close(descriptor)


class _FileReader:
    def __init__(self, descriptor: int, file: SafetensorsFile) -> None:
        self.descriptor = descriptor
        self.file = file

    def read(self, name: str) -> torch.Tensor:
        entry = self.file.entries[name]
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        if entry.size:
            # Straight from the file into the tensor's own memory, which no intermediate buffer ever holds twice.
            target = memoryview((ctypes.c_char * entry.size).from_address(tensor.data_ptr())).cast("B")
            self._fill(target, entry.offset, name)
        return tensor

    def _fill(self, target: memoryview, offset: int, name: str) -> None:
        done = 0
        os.lseek(self.descriptor, offset, os.SEEK_SET)
        while done < len(target):
            count = os.readv(self.descriptor, [target[done:]])
            if count == 0:
                raise CheckpointError(f"{self.file.path} was cut off while it was read, at tensor {name!r}")
            done += count


class TensorsInMemory:
    """Tensors that are in memory already: of a `.bin` file, or given by the caller. Each is copied when it is read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], place: str, hand_over: bool = False) -> None:
        self.place = place
        self.tensors = tensors
        self.hand_over = hand_over
        self.entries = {
            name: Entry(_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape), 0, t.numel() * t.element_size())
            for name, t in tensors.items()
        }

    @contextmanager
    def reader(self) -> Iterator[TensorsInMemory]:
        yield self

    def read(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name].detach()
        owns_memory = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if self.hand_over and owns_memory and tensor.is_contiguous() else tensor.clone()


def open_weights(path: Path) -> Weights:
    """The tensors in `path`, a `.safetensors` or a `.bin` file.

    Raises:
        CheckpointError: the file is damaged.
        pickle.UnpicklingError: a `.bin` file holds anything but tensors; nothing in it has been run.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)  # type: ignore[return-value]
    return TensorsInMemory(_unpickle(path), str(path), hand_over=True)  # type: ignore[return-value]


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a file")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(
            f"{path} holds something other than tensors, and nothing of it was run. Ask its author for a "
            f"safetensors file. ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} holds a {type(tensors).__name__}; an adapter is a dict of tensors")
    return tensors
