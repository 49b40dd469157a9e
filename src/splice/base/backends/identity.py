"""The weight of a linear layer, from what the layer makes of the unit vectors: for kernels with a packing of their own."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from splice.base.backends.backend import Foreign
from splice.base.bare import without_adapters


@torch.no_grad()
def weight_by_identity(layer: Foreign) -> torch.Tensor:
    """(out, in), in the dtype in which the layer computes; exact where it does not round its inputs."""
    # Each library has a kernel for each device, and each kernel a packing: the layer itself is the one that knows.
    bare: Foreign = without_adapters(layer)
    like = next(tensor for tensor in _tensors(bare) if tensor.is_floating_point())
    units = torch.eye(bare.in_features, dtype=like.dtype, device=like.device)
    columns: torch.Tensor = bare.forward(units)
    bias: torch.Tensor | None = bare.bias
    return (columns if bias is None else columns - bias).T.contiguous()


def _tensors(layer: Foreign) -> Iterator[torch.Tensor]:
    for registry in (layer._parameters, layer._buffers):
        yield from (tensor for tensor in registry.values() if tensor is not None)
