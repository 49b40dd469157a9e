"""The header of a safetensors file: what tensors it holds and where. No tensor is read and torch is not needed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from splice.errors import CheckpointError

# What is not listed cannot be read.
_INTEGERS = ("BOOL", "U8", "I8", "I16", "I32", "I64", "U16", "U32", "U64")
_FLOATS = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F16", "BF16", "F32", "F64")
DTYPE_NAMES = frozenset((*_INTEGERS, *_FLOATS))


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: its dtype as safetensors spells it, its shape, and its place in the file (bytes)."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """All entries by name, and the file's own metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header: a file whose header passes here can be read to the last byte.

    What is a valid file is decided by the safetensors library itself.

    Raises:
        CheckpointError: the file is damaged or no safetensors file; the message says what is wrong with it.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a file")
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            size = os.fstat(file.fileno()).st_size
            raise CheckpointError(f"{path} is {_what_it_is(start, size)} ({error})") from error
        fields = _parse(file.read(length), path)
    metadata = fields.pop("__metadata__", None) or {}
    return Header({name: _entry(name, value, 8 + length, path) for name, value in fields.items()}, metadata)


def _what_it_is(start: bytes, size: int) -> str:
    if start.startswith(b"version "):
        return "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "a PyTorch pickle under the name of a safetensors file: rename it to adapter_model.bin"
    return f"damaged, at {size} bytes: a download or a copy that was cut off, or no safetensors file"


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise CheckpointError(f"{path}: the header names {twice} twice")
        return result

    fields: dict[str, Any] = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    return fields


def _entry(name: str, value: Any, data_start: int, path: Path) -> Entry:
    dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{path}: tensor {name!r} has the dtype {dtype!r}; known are {sorted(DTYPE_NAMES)}")
    return Entry(dtype, shape, data_start + begin, end - begin)
