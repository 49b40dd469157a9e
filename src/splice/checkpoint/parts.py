"""Reading for tensors that are divided among processes: each process reads what it keeps, and no more."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from splice.base.sharding import from_part, part_of
from splice.checkpoint.tensors import Weights


def read_for(weights: Weights, wanted: Sequence[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Values for these tensors, each beside its name in `weights`.

    For a tensor that is divided the values are divided likewise, unless it is divided in a way that is no box of the whole:
    then all values are read, and whoever takes them divides them.
    """
    parts = [part_of(tensor) for _, tensor in wanted]
    # In one go: most tensors of an adapter lie behind one another.
    plain = iter(weights.read([name for (name, _), part in zip(wanted, parts) if part is None]))
    return [
        next(plain) if part is None else from_part(weights.read_part(name, part), tensor)
        for (name, tensor), part in zip(wanted, parts)
    ]
