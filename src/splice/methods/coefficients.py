"""The kind of a few trained coefficients, each at a place of a matrix, out of which the update of a weight is worked out.

Where they stand is no part of a checkpoint: it follows from a seed and the shape of the weight.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from splice.kinds.weight_delta import WeightDelta


# A draw goes through all of the weight: it is made once for all layers of one shape.
@lru_cache(maxsize=256)
def locations(size: int, count: int, seed: int) -> torch.Tensor:
    """Flat indices of the coefficients, in their order."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].clone()


def check_count(count: int, field: str, shape: tuple[int, ...], path: str) -> None:
    """Raise where a weight of this shape has no places for so many coefficients.

    Raises:
        ValueError: with the path of the layer.
    """
    rows, columns = shape
    if count > rows * columns:
        raise ValueError(
            f"{path}: `{field}` is {count}, and the weight has {rows} x {columns} = {rows * columns} places. "
            f"Lower it, or give this layer its own with `{field}_pattern`."
        )


class Coefficients(WeightDelta):
    """An update of the weight out of coefficients at fixed places."""

    # Where the coefficients stand, and what else follows from the places: no buffers, but the same objects for all layers of
    # one shape, until they are needed on another device.
    fixed: tuple[torch.Tensor, ...] = ()

    def fixed_on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """What is fixed, on this device."""
        if self.fixed[0].device == device:
            return self.fixed
        moved = tuple(tensor.to(device) for tensor in self.fixed)
        if device.type != "meta":  # offloaded for a while: where they stand must not be forgotten
            self.fixed = moved
        return moved
