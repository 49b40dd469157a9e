"""Rotations made from skew-symmetric matrices, block by block; and what is rotated of a layer.

Q is skew-symmetric and given by its values above the diagonal; the Cayley transform `(I - Q)(I + Q)^-1` of it is a rotation,
and so, nearly, is a series for that inverse (Qiu et al., "Orthogonal Finetuning Made Scalable", arXiv 2506.19847).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_batchedtensor

from splice.kinds.convolution import as_convolution
from splice.kinds.scale import add_scaled


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
    found = add_scaled(identity, q, 2.0)
    if terms == 2:
        return found
    power = q
    for _ in range(max(terms, 4) - 3):
        power = power @ q
        found = add_scaled(found, power, 2.0)
    return found + power @ q


def in_blocks(x: torch.Tensor, side: int) -> torch.Tensor:
    """`x` (..., size) cut into pieces of `side` values, (blocks, vectors, side): what each block of a rotation turns."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1] // side, side).transpose(0, 1)


def in_rows(pieces: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What `in_blocks` has cut, in one piece again, in the shape of `like`."""
    return pieces.transpose(0, 1).reshape(like.shape)


def is_few(x: torch.Tensor, side: int, terms: int | None) -> bool:
    """Whether so few vectors are turned by blocks of this side that `turned` costs less than blocks of R."""
    return x.numel() * (1 if terms is None else 2) <= x.shape[-1] * side


def turned(x: torch.Tensor, q: torch.Tensor, terms: int | None) -> torch.Tensor:
    """`x R` for few vectors `x` (blocks, vectors, s), each of the steps that would make R done to them alone.

    Args:
        x: in the dtype of `q`.
        q: (blocks, s, s), skew-symmetric.
        terms: of the series; None for the exact R.
    """
    return _turned_exactly(x, q) if terms is None else _turned_by_series(x, q, terms)


def _turned_exactly(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    system = q + torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    found = _solved(system, x) if _are_many_small(q, x) else torch.linalg.solve(system, x, left=False)
    return torch.sub(2 * found, x)  # `(I - Q) (I + Q)^-1` is `2 (I + Q)^-1 - I`


def _are_many_small(q: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `_solved` takes less than LAPACK, and is as exact."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    side = q.shape[-1]
    if not (q.is_cpu and side <= 32 and len(q) >= 16 * side and 2 * x.shape[1] <= side):
        return False
    # Beside larger values than these the identity's are small pivots, and rounding grows with the square of what they divide.
    return bool(q.abs().max() <= 2)


def _solved(system: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x M^-1` for many small matrices M `system` (blocks, s, s), all at once, and rows `x` (blocks, rows, s).

    No row is exchanged for another: M is the identity and something skew-symmetric, of values up to 2, so that no pivot is
    below 1 and none is small beside the others.
    """
    # LAPACK takes one block after the other, and longer for each than its numbers would: six times for eight rows.
    size = system.shape[-1]
    if size <= 16:
        return _eliminated(system, x)
    half = size // 2
    (a, b), (c, d) = (torch.split(rows, [half, size - half], 2) for rows in torch.split(system, [half, size - half], 1))
    below, first = torch.split(_solved(a, torch.cat((c, x[..., :half]), 1)), [size - half, x.shape[1]], 1)
    second = _solved(torch.baddbmm(d, below, b, alpha=-1), torch.baddbmm(x[..., half:], first, b, alpha=-1))
    return torch.cat((torch.baddbmm(first, second, below, alpha=-1), second), -1)


def _eliminated(system: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    # Blocks last, so that each step is one long loop: (columns, rows of M and then of x, blocks).
    size = system.shape[-1]
    left = torch.cat((system, x), 1).permute(2, 1, 0).contiguous()
    for k in range(size):
        left[k, k + 1 :] /= left[k, k].clone()
        left[k + 1 :, k + 1 :].addcmul_(left[k + 1 :, k, None], left[k, None, k + 1 :], value=-1)
    found = left[:, size:]
    for k in range(size - 1, 0, -1):
        found[:k].addcmul_(left[:k, k, None], found[k, None], value=-1)
    return found.permute(2, 1, 0).contiguous()  # others are multiplied one by one


def _turned_by_series(x: torch.Tensor, q: torch.Tensor, terms: int) -> torch.Tensor:
    if terms < 2:
        return x
    power = torch.bmm(x, q)
    found = add_scaled(x, power, 2.0)
    if terms == 2:
        return found
    for _ in range(max(terms, 4) - 3):
        power = torch.bmm(power, q)
        found = add_scaled(found, power, 2.0)
    return torch.baddbmm(found, power, q)


def each_block(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """What a function makes of tensors (blocks, ...), of each block by itself.

    The blocks of several adapters, which `torch.vmap` maps over, are as many more blocks. What it does itself to lookups,
    products and solvers costs more than it saves.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not any(map(is_batchedtensor, tensors)):
        return function(*tensors)
    found: torch.Tensor = _EachBlock.apply(function, *tensors)  # type: ignore[no-untyped-call]
    return found


class _EachBlock(torch.autograd.Function):
    # Without a backward: where there are gradients it is not used.

    @staticmethod
    def forward(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[object, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], function: Callable[..., torch.Tensor], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        count: int = info.batch_size
        first = [
            tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims[1:])
        ]
        found = each_block(function, *(tensor.flatten(0, 1) for tensor in first))
        return found.view(count, -1, *found.shape[1:]), 0
