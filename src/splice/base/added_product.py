"""A weight with a low-rank product added to it, a few rows at a time: neither the product nor its sum is there as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from splice.base.dense import AT_ONCE, is_plain_tensor

# Numbers of a weight that are summed at once. Of fewer, several threads wait for one another in the interpreter; more are no
# longer in the processor's cache.
_ROWS_AT_ONCE = 1 << 19


class AddedProduct(NamedTuple):
    """`weight + scale * b @ a`, of a weight on the CPU. It may be worked out in several threads."""

    # (out, r), in the dtype of the sum.
    b: torch.Tensor
    # (r, in), likewise.
    a: torch.Tensor
    # What the product is multiplied with.
    scale: float
    # How many rows are worked out at once.
    height: int

    @classmethod
    def of(
        cls, shape: Sequence[int], dtype: torch.dtype, b: torch.Tensor, a: torch.Tensor, scale: float
    ) -> AddedProduct | None:
        """For a weight of this shape (out, in) and dtype; None where the product has to be there as a whole.

        That is of weights that are small, of factors that are divided or on another device, and where the sum is in a wider
        dtype than the product.
        """
        b, a = b.detach(), a.detach()
        size = shape[0] * shape[1] if len(shape) == 2 else 0
        if size <= AT_ONCE or not (is_plain_tensor(a) and is_plain_tensor(b)):
            return None
        if a.dtype in (torch.float16, torch.bfloat16):  # as sums of half precision on a CPU are
            a, b = a.float(), b.float()
        if torch.promote_types(dtype, a.dtype) is not a.dtype:
            return None
        # All pieces of about one size: a product of few rows is summed in another order.
        return cls(b, a, scale, -(-shape[0] // -(-size // _ROWS_AT_ONCE)))

    def pieces(self) -> Iterator[slice]:
        """The rows that are worked out at once, in their order."""
        return (slice(begin, begin + self.height) for begin in range(0, len(self.b), self.height))

    def room(self) -> torch.Tensor:
        """Memory for one piece. New one for each would take longer to get than to fill."""
        return torch.empty(self.height, self.a.shape[1], dtype=self.a.dtype)

    @torch.no_grad()
    def add(self, rows: slice, weight: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """The sum for these rows of the weight (rows, in), in the dtype of the factors; it lies in `room`."""
        b = self.b[rows]
        return torch.mm(b, self.a, out=room[: len(b)]).mul_(self.scale).add_(weight)


def added_product(weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor | None:
    """`added(weight, scale * b @ a)` without all of the product; None where that has to be there as a whole."""
    weight = weight.detach()
    known = AddedProduct.of(weight.shape, weight.dtype, b, a, scale)
    if known is None or not is_plain_tensor(weight) or not weight.is_contiguous():
        return None
    result, room = torch.empty_like(weight), known.room()
    for rows in known.pieces():
        result[rows] = known.add(rows, weight[rows], room)
    return result
