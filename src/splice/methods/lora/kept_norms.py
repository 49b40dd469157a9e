"""Norms of weights that DoRA keeps between calls, and how it finds out that they are those of other values by now.

To measure M = W + s B A takes a matrix as large as the weight, and many times as long as a call with one token. So norms are
kept, and each call works out the product of M with one fixed vector, which reads W, A and B once: where it is to the bit
what it was, so is the norm. That sees changes that no version counter knows of (`.data`, another library's kernels), and a
weight that is worked out anew at each call. A change that it does not see is lost in the rounding of a sum over the very
numbers that the norm is a sum over, and is lost there as well.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from splice.kinds.scale import Scale


class Kept(NamedTuple):
    """A norm, and what it was measured on. No copy or pickle of a layer has it."""

    # n(M), of as many dimensions as the weight.
    norm: torch.Tensor
    # The product of M with the fixed vector; None where none was worked out.
    trace: torch.Tensor | None
    # What told, inside `DoraCaching`, that M is the same, without reading it; None outside.
    state: tuple[object, ...] | None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def may_keep(weight: torch.Tensor) -> bool:
    """Whether what is measured on this weight now is what any later call would measure, and has values at all."""
    # A graph, or what maps a function, has none; and inside autocast it is measured with less precision.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not weight.is_meta and not torch.is_autocast_enabled(weight.device.type)


def can_be_traced(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: Scale) -> bool:
    """Whether `trace_of_sum` of these is to be compared with that of an earlier call."""
    # On other devices a comparison would wait for all that is under way; a sum in half precision hides too much.
    dtype = weight.dtype
    if type(a) is not nn.Parameter or type(b) is not nn.Parameter or type(weight) is not torch.Tensor:
        return False
    if not (weight.is_cpu and dtype in (torch.float32, torch.float64) and a.dtype is b.dtype is dtype and a.is_cpu):
        return False
    return isinstance(scale, (int, float))


def trace_of(matrix: torch.Tensor) -> torch.Tensor:
    """The product of each row of `matrix` (rows, ...) with the fixed vector, (rows,)."""
    flat = matrix if matrix.dim() == 2 else matrix.flatten(1)
    return torch.mv(flat, _probe(flat.shape[1], flat.dtype))


def trace_of_sum(trace: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor:
    """The same of `M + scale * b a`, for the `trace` of M (rows,), b (rows, r, 1...) and a (r, ...)."""
    return torch.addmv(trace, b if b.dim() == 2 else b.flatten(1), trace_of(a), alpha=scale)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _probe(size: int, dtype: torch.dtype) -> torch.Tensor:
    # All numbers differ, so that values cannot change places, and none is near zero, so that none is overlooked.
    source = torch.Generator().manual_seed(0)
    sizes = 1 + torch.rand(size, generator=source, dtype=torch.float64)
    return (sizes * torch.randn(size, generator=source, dtype=torch.float64).sign()).to(dtype)
