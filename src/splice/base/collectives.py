"""Sums over processes that gradients flow through, for layers that tensor parallelism divides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.autograd import Function

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Summed(Function):
    """The sum forward; backward the gradient as it is, since every process has the whole of it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        return gradients[0], None


class _WithSummedGradients(Function):
    """The tensor as it is; backward the sum, since every process has the gradient of what it did with it itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        return _sum(gradients[0], ctx.group), None


def _sum(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(x, group=group)
    return x


def summed(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The sum of what the processes have, of one shape."""
    found: torch.Tensor = _Summed.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def with_summed_gradients(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """`x`, which all processes have, where each goes on with it in another way."""
    found: torch.Tensor = _WithSummedGradients.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def joined(part: torch.Tensor, begin: int, size: int, group: ProcessGroup) -> torch.Tensor:
    """The parts that the processes have of the last dimension behind one another, (..., size); this one's goes to `begin`."""
    # By a sum and not by gathering: the last parts may be shorter.
    behind = size - begin - part.shape[-1]
    return summed(torch.nn.functional.pad(part, (begin, behind)), group)
