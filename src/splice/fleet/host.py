"""Adapters in host memory: what their files hold, read once, for the next time that they are put on the model."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import torch

from splice.checkpoint.tensors import DTYPES, TensorsInMemory
from splice.fleet.limits import StoreLimits
from splice.kinds.reading import Checkpoint

# Of the addresses of tensors that lie in one piece of memory, in bytes: that of the widest dtype.
_ALIGNED = 16


class InHost(NamedTuple):
    """An adapter in host memory."""

    # With weights that are lent.
    checkpoint: Checkpoint
    # How many bytes its tensors take.
    nbytes: int

    @classmethod
    def read(cls, checkpoint: Checkpoint, pinned: bool) -> InHost:
        """Read all tensors of a checkpoint; `pinned` into memory that a GPU copies from by itself."""
        weights = checkpoint.weights
        names = list(weights.entries)
        if isinstance(weights, TensorsInMemory):
            tensors = list(weights.tensors.values())
        else:
            room = dict(zip(names, _room([(e.dtype, e.shape) for e in weights.entries.values()], pinned)))
            tensors = weights.read(names, room)
        lent = TensorsInMemory(dict(zip(names, tensors)), weights.place, lends=True)
        lent.metadata = weights.metadata
        return cls(checkpoint._replace(weights=lent), sum(tensor.nbytes for tensor in tensors))


def _room(wanted: list[tuple[str, tuple[int, ...]]], pinned: bool) -> list[torch.Tensor]:
    """Empty tensors of these dtypes and shapes in one piece of memory: to pin each by itself would cost more than to read."""
    sizes = [math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in wanted]
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // _ALIGNED) * _ALIGNED
    with torch.inference_mode(False):  # a call may be what asks for it, and the next one has gradients
        memory = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        parts = zip(wanted, starts, sizes)
        return [memory[begin : begin + size].view(DTYPES[of]).view(shape) for (of, shape), begin, size in parts]


class HostLevel:
    """The adapters in host memory, by name; the one that was used last is the last."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, InHost] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def find(self, name: str) -> InHost | None:
        """The adapter of this name, which has been used now; None where it is not here."""
        found = self._held.get(name)
        if found is not None:
            self._held.move_to_end(name)
        return found

    def put(self, name: str, held: InHost) -> None:
        """Keep an adapter."""
        self.drop(name)
        self._held[name] = held
        self.nbytes += held.nbytes

    def drop(self, name: str) -> None:
        """Keep it no more, if it is here."""
        found = self._held.pop(name, None)
        if found is not None:
            self.nbytes -= found.nbytes

    def trim(self, limits: StoreLimits) -> int:
        """Drop what is too much, the one that was not used for the longest time first; how many that were."""
        dropped = 0
        while self._held and (
            (limits.host_count is not None and len(self._held) > limits.host_count)
            or (limits.host_bytes is not None and self.nbytes > limits.host_bytes)
        ):
            self.drop(next(iter(self._held)))
            dropped += 1
        return dropped
