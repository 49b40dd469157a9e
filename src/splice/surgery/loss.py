"""What is lost where a merged weight is stored in few bits again, in one line and layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from splice.errors import counted


class StorageLoss(NamedTuple):
    """The difference between a merged weight and what its layer could store of it.

    Attributes:
        path: the layer.
        backend: how it stores its weight: "bnb 4bit".
        largest: the largest absolute difference of a value.
        relative: the norm of the difference, divided by that of the weight.
    """

    path: str
    backend: str
    largest: float
    relative: float

    @classmethod
    def between(cls, path: str, backend: str, wanted: torch.Tensor, stored: torch.Tensor) -> StorageLoss:
        """Of a merged weight and the stored one, both dense."""
        difference = stored.to(wanted.dtype) - wanted
        norm = torch.linalg.vector_norm(wanted)
        relative = torch.linalg.vector_norm(difference) / norm if norm else norm
        return cls(path, backend, float(difference.abs().max()), float(relative))


class MergeReport(NamedTuple):
    """`str(report)`: "default: merged into 224 layers, 224 of them stored as bnb 4bit; ...".

    Attributes:
        adapter_names: the adapters that were merged.
        layers: how many layers they were merged into.
        losses: of the layers that do not store their weight as it was worked out, in the order of the model.
    """

    adapter_names: tuple[str, ...]
    layers: int
    losses: tuple[StorageLoss, ...] = ()

    def __str__(self) -> str:
        line = f"{', '.join(self.adapter_names)}: merged into {counted(self.layers, 'layer')}"
        if not self.losses:
            return line
        backends = " and ".join(dict.fromkeys(loss.backend for loss in self.losses))
        worst = max(self.losses, key=lambda loss: loss.relative)
        largest = max(self.losses, key=lambda loss: loss.largest)
        return (
            f"{line}, {len(self.losses)} of them stored as {backends}, which rounds what is merged: by "
            f"{worst.relative:.1%} of the weight at most ({worst.path}), and no value by more than {largest.largest:.2g} "
            f"({largest.path})"
        )


def losses_of(found: Iterable[StorageLoss | None]) -> tuple[StorageLoss, ...]:
    """Those that are there."""
    return tuple(loss for loss in found if loss is not None)
