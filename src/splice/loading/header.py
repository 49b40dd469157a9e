"""The header of a safetensors file: what tensors it holds and where. No tensor is read and torch is not needed."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splice.errors import CheckpointError

MAX_HEADER = 100_000_000
# Bits of one element. What is not listed cannot be read.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


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

    Raises:
        CheckpointError: the file is damaged or no safetensors file; the message says what is wrong with it.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a file")
    with open(path, "rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > MAX_HEADER or 8 + length > file_size:
            raise CheckpointError(f"{path} is {_what_it_is(start, file_size)}")
        raw = file.read(length)
    fields = _parse(raw, path)
    metadata = fields.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: the metadata of the header must map names to strings")
    entries = {name: _entry(name, value, 8 + length, path) for name, value in fields.items()}
    _check_covered(entries, 8 + length, file_size, path)
    return Header(entries, metadata)


def _what_it_is(start: bytes, size: int) -> str:
    if start.startswith(b"version "):
        return "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "a PyTorch pickle under the name of a safetensors file: rename it to adapter_model.bin"
    return f"damaged: its header does not fit its {size} bytes (a download or a copy that was cut off?)"


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise CheckpointError(f"{path}: the header names {twice} twice")
        return result

    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its header is not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is damaged: its header is no JSON object")
    return fields


def _entry(name: str, value: Any, data_start: int, path: Path) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = (*shape, begin, end)
        sound = all(type(n) is int and n >= 0 for n in numbers)
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path} is damaged: the header's entry for {name!r} is {value!r}")
    if dtype not in _BITS:
        raise CheckpointError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}; known are {sorted(_BITS)}")
    size = math.prod(shape) * _BITS[dtype] // 8
    if end - begin != size:
        raise CheckpointError(
            f"{path} is damaged: {name!r} of shape {list(shape)} and dtype {dtype} needs {size} bytes and has {end - begin}"
        )
    return Entry(dtype, shape, data_start + begin, size)


def _check_covered(entries: dict[str, Entry], data_start: int, file_size: int, path: Path) -> None:
    position = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.size)):
        if entry.offset != position:
            raise CheckpointError(f"{path} is damaged: its tensors overlap or leave gaps at byte {position}")
        position += entry.size
    if position != file_size:
        raise CheckpointError(
            f"{path} is damaged: its header describes {position} bytes and the file has {file_size} "
            "(a download or a copy that was cut off?)"
        )
