"""The header of a safetensors file: what tensors it holds and where. No tensor is read and torch is not needed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypedDict

from safetensors import SafetensorError, safe_open

from splice.checkpoint.foreign import LFS_START, lfs_pointer
from splice.errors import CheckpointError

# Dtypes by their names in the format. Those of less than a byte are not among them: they pack values, and no adapter's tensor
# is packed. What is not listed is refused.
_INTEGERS = ("BOOL", "U8", "I8", "I16", "I32", "I64", "U16", "U32", "U64")
_FLOATS = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F16", "BF16", "F32", "F64")
DTYPE_NAMES = frozenset((*_INTEGERS, *_FLOATS))


class Entry(NamedTuple):
    """One tensor of a checkpoint, before it is read."""

    # As safetensors spells it: "F32", "BF16".
    dtype: str
    # Empty of a single number.
    shape: tuple[int, ...]
    # Where its values begin: bytes from the start of the file; 0 of a tensor that is in memory.
    offset: int
    # How many bytes its values are.
    size: int


class Header(NamedTuple):
    """What stands in front of the tensors in a safetensors file."""

    # All tensors, by name, in the order of the header; that of the values may be another.
    entries: dict[str, Entry]
    # What the writer noted beside them; empty where it noted nothing.
    metadata: dict[str, str]


class _Stored(TypedDict):
    """A tensor as the header spells it. Its bytes are counted from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_header(path: Path, descriptor: int | None = None) -> Header:
    """Read and check the header: a file whose header passes here can be read to the last byte.

    The safetensors library itself decides what a valid file is. Checks of our own could let one pass that all others refuse.

    Args:
        path: of the file.
        descriptor: the file, already open; it is read through this, whatever has the name meanwhile. It stays open.

    Raises:
        CheckpointError: the file is damaged or no safetensors file; the message says what is wrong with it.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a file")
    with open(path if descriptor is None else descriptor, "rb", closefd=descriptor is None) as file:
        start = file.read(len(LFS_START))
        length = int.from_bytes(start[:8], "little")
        try:
            with safe_open(_name_of(file.fileno(), path), framework=_framework()):
                pass
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            size = os.fstat(file.fileno()).st_size
            raise CheckpointError(_what_it_is(path, start, size, error)) from error
        # Our own parse of what has just been checked: the library tells shapes and dtypes, and not where the values are.
        file.seek(8)
        tensors, metadata = _parse(file.read(length), path)
    return Header({name: _entry(name, value, 8 + length, path) for name, value in tensors.items()}, metadata)


def check_header(path: Path) -> int:
    """Check the header as `read_header` does, without telling what is in it; the size of the file, in bytes.

    Raises:
        CheckpointError: the file is damaged or no safetensors file; the message says what is wrong with it.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a file")
    with open(path, "rb") as file:
        start, size = file.read(len(LFS_START)), os.fstat(file.fileno()).st_size
        try:
            with safe_open(_name_of(file.fileno(), path), framework=_framework()):
                return size
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            raise CheckpointError(_what_it_is(path, start, size, error)) from error


def _name_of(descriptor: int, path: Path) -> str:
    """A name for the very file that is open: the path may be another file's by now."""
    own = f"/dev/fd/{descriptor}"
    return own if os.path.exists(own) else str(path)


def _framework() -> str:
    """Which library safetensors imports as it opens a file, though no tensor is made here."""
    # torch takes a second or more to import, numpy a tenth. But torch alone is sure to be installed.
    return "pt" if sys.modules.get("torch") is not None or importlib.util.find_spec("numpy") is None else "np"


def _what_it_is(path: Path, start: bytes, size: int, error: Exception) -> str:
    if start == LFS_START:
        return lfs_pointer(str(path))
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):  # a zip, of torch since 1.6, and a bare pickle, of torch before
        what = "a PyTorch pickle under the name of a safetensors file: rename it to adapter_model.bin"
    else:
        what = f"damaged, at {size} bytes: a download or a copy that was cut off, or no safetensors file"
    return f"{path} is {what} ({error})"


def _parse(raw: bytes, path: Path) -> tuple[dict[str, _Stored], dict[str, str]]:
    # JSON lets a name come twice, and the last one wins in silence: one of the two tensors would be lost.
    text = raw.decode("utf-8")
    fields = json.loads(text)
    if not _names_come_once(raw, fields):
        fields = json.loads(text, object_pairs_hook=partial(_without_duplicates, path))
    metadata = fields.pop("__metadata__", None)
    return fields, metadata or {}


def _names_come_once(raw: bytes, fields: Mapping[str, Mapping[str, object]]) -> bool:
    """Whether it is plain that no name in `raw` comes twice; only where this is False have they to be looked at one by one.

    Each pair has one colon, and each colon that is in no string belongs to one pair: of two pairs with one name, `fields`
    would have one too few. Looking at every pair as it is parsed costs half as much as the parsing itself.
    """
    strings = [*fields, *chain.from_iterable((fields.get("__metadata__") or {}).items())]
    pairs = len(fields) + sum(len(value or ()) for value in fields.values())
    return b"\\u003" not in raw and raw.count(b":") == pairs + "".join(map(str, strings)).count(":")


def _without_duplicates(path: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise CheckpointError(f"{path}: the header names {twice} twice")
    return result


def _entry(name: str, value: _Stored, data_start: int, path: Path) -> Entry:
    dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{path}: tensor {name!r} has the dtype {dtype!r}; known are {sorted(DTYPE_NAMES)}")
    return Entry(dtype, shape, data_start + begin, end - begin)
