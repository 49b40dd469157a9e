"""Tensors that are known and not read: of files, or made when they are asked for. Written one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from splice.base.sharding import Part, part_in, whole
from splice.checkpoint.files import flush
from splice.checkpoint.header import Entry
from splice.checkpoint.tensors import DTYPE_NAMES, DTYPES, Weights, memory_of
from splice.errors import CheckpointError


class Unread(NamedTuple):
    """A tensor whose values come when they are asked for."""

    # As safetensors spells it: "F32", "BF16".
    dtype: str
    # Empty of a single number.
    shape: tuple[int, ...]
    # Gives the values, on the CPU.
    read: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """How many bytes its values are."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def unread_in(weights: Weights, names: Mapping[str, str] | None = None) -> dict[str, Unread]:
    """The tensors of a checkpoint; `names` gives those that are meant: new name -> its name in `weights`.

    Raises:
        CheckpointError: one is of a dtype that safetensors has not.
    """
    found = {}
    for name, own in (names or {name: name for name in weights.entries}).items():
        entry = weights.entries[own]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{weights.place}: {own!r} has the dtype {entry.dtype}, which no file of weights holds"
            )
        found[name] = Unread(entry.dtype, entry.shape, lambda own=own: weights.read([own])[0])  # type: ignore[misc]
    return found


def made(tensor: torch.Tensor) -> Unread:
    """A tensor that is there already."""
    return Unread(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), lambda: tensor)


class UnreadWeights:
    """Tensors that are not read, as those of a checkpoint."""

    lends = False

    def __init__(self, tensors: Mapping[str, Unread], place: str) -> None:
        self.place = place
        self.metadata: Mapping[str, str] = {}
        self.tensors = tensors
        self.entries = {name: Entry(t.dtype, t.shape, 0, t.size) for name, t in tensors.items()}

    def read(self, names: Sequence[str], into: Mapping[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
        return [self.tensors[name].read() for name in names]

    def read_part(self, name: str, part: Part) -> torch.Tensor:
        return part_in(whole(self.tensors[name].read()), part)

    def says(self, name: str, tensor: torch.Tensor) -> bool:
        own = self.tensors[name].read()
        return own.dtype is tensor.dtype and torch.equal(own, tensor)


def write_tensors(path: Path, tensors: Mapping[str, Unread], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in the memory of one tensor. `path` must not have its final name yet."""
    # The largest elements first, so that all of them lie where their size asks for it; else by name, for one order.
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].size
        header[name] = {"dtype": tensors[name].dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name].read().detach().contiguous()
            assert (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) == tensors[name][:2], name
            if tensor.numel():
                file.write(memory_of(tensor))
    flush(path)
