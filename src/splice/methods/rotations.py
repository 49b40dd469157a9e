"""Rotations made from skew-symmetric matrices, block by block; and what is rotated of a layer.

Q is skew-symmetric and given by its values above the diagonal; the Cayley transform `(I - Q)(I + Q)^-1` of it is a rotation,
and so, nearly, is a series for that inverse (Qiu et al., "Orthogonal Finetuning Made Scalable", arXiv 2506.19847).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from splice.kinds.convolution import as_convolution


def flat_inputs(base: nn.Module, path: str, method: str) -> int:
    """How many values each output of a two-dimensional convolution reads at one place: these are transformed together.

    Raises:
        ValueError: it has groups, or a kernel that is no square; the message names `method`.
    """
    conv = as_convolution(base)
    kernel = conv.kernel_size
    if conv.groups > 1 or kernel[0] != kernel[1]:
        raise ValueError(
            f"{path}: {method} is not defined on a Conv2d with groups (here {conv.groups}) or with a kernel that is no "
            f"square (here {kernel}); exclude it with `exclude_modules`."
        )
    return conv.in_channels * kernel[0] ** 2


@lru_cache(maxsize=256)
def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` that is nearest to `wanted`; of two the smaller. The shapes of checkpoints follow from it."""
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - wanted), n))


@lru_cache(maxsize=64)
def skew_places(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each place of a (size, size) matrix, flat: which of the values above the diagonal stands there, and its sign."""
    rows, columns = torch.triu_indices(size, size, 1)
    place = torch.zeros(size, size, dtype=torch.long)
    sign = torch.zeros(size, size)
    place[rows, columns] = place[columns, rows] = torch.arange(len(rows))
    sign[rows, columns], sign[columns, rows] = 1.0, -1.0
    return place.flatten(), sign


def cayley(q: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    found: torch.Tensor = torch.linalg.solve(identity + q, identity - q, left=False)
    return found


def series(q: torch.Tensor, terms: int) -> torch.Tensor:
    """`I + 2 (Q + ... + Q^(t-2)) + Q^(t-1)`; three terms are taken for four, as in every checkpoint with three."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms < 2:
        return identity.expand_as(q)
    found = torch.add(identity, q, alpha=2)
    if terms == 2:
        return found
    power = q
    for _ in range(max(terms, 4) - 3):
        power = power @ q
        found = torch.add(found, power, alpha=2)
    return found + power @ q
