"""The values of tensors in a file, for whoever looks at them without torch. Read in pieces, never mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from splice.checkpoint.header import Entry
from splice.checkpoint.outline import Array
from splice.errors import CheckpointError

if TYPE_CHECKING:
    import numpy.typing as npt

# Bytes that are looked at in one go: tensors may be larger than the memory.
_PIECE = 1 << 22
# What numpy reads itself. The rest is made of bytes by `_decoded`.
_PLAIN = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U16": "<u2", "U32": "<u4", "U64": "<u8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip


class Values:
    """A file of tensors, open. Use it as a context manager."""

    # Mapped, the process would end by a signal when somebody cuts the file off meanwhile.

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by `__exit__`)

    def __enter__(self) -> Values:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def pieces(self, entry: Entry) -> Iterator[npt.NDArray[np.generic]]:
        """The values of a tensor, flat, a piece at a time: in a dtype of numpy that holds every one of them.

        Raises:
            CheckpointError: the file is shorter than it was.
        """
        for start in range(0, entry.size, _PIECE):
            yield _decoded(self._bytes(entry.offset + start, min(_PIECE, entry.size - start)), entry.dtype)

    def read(self, entry: Entry) -> Array:
        """A whole tensor, in float32 and in its shape."""
        found = [np.asarray(piece, dtype=np.float32) for piece in self.pieces(entry)]
        flat = np.concatenate(found) if found else np.empty(0, np.float32)
        return flat.reshape(entry.shape)

    def _bytes(self, offset: int, size: int) -> bytes:
        found = b""
        while len(found) < size:
            piece = os.pread(self._file.fileno(), size - len(found), offset + len(found))
            if not piece:
                raise CheckpointError(f"{self._path} was cut off while it was read")
            found += piece
        return found


def _decoded(raw: bytes, dtype: str) -> npt.NDArray[np.generic]:
    if dtype in _PLAIN:
        return np.frombuffer(raw, _PLAIN[dtype])
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.take(_eight_bits(dtype), np.frombuffer(raw, np.uint8))


@cache
def _eight_bits(dtype: str) -> npt.NDArray[np.float32]:
    """What each of the 256 bytes means in a dtype of one byte."""
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (codes << 8).view(np.float16).astype(np.float32)
    if dtype == "F8_E8M0":
        powers = np.ldexp(np.float32(1), np.minimum(codes, 254).astype(np.int32) - 127)
        return np.where(codes == 255, np.float32(np.nan), powers)
    # F8_E4M3, which has NaN and no infinity.
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent.astype(np.int32) - 7)
    found = np.where(exponent == 0, np.float32(2.0**-6) * mantissa / 8, normal).astype(np.float32)
    found[(codes & 127) == 127] = np.nan
    return np.where(codes > 127, -found, found)
