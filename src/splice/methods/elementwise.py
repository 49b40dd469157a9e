"""A weight that is multiplied elementwise by a low-rank matrix, as few rows see it: without making that matrix."""

from __future__ import annotations

import torch

# Up to so many rows the product is worked out rank by rank. It goes through the weight once for each rank and row, in one
# product, where the whole matrix is made by as many steps for all rows, and by writing two matrices of the weight's size.
# For one row it takes a half of the time on layers of 512 and 2048 features, for two as long at the most; from three rows on
# it takes longer with a rank of 32.
MOST_ROWS = 2


def product_with(weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`(W * (B A)) x` for rows `x` (rows, in): (rows, out); W (out, in), B (out, r) and A (r, in), all of one dtype."""
    # It is the sum over r of `B[:, r] * (W (A[r] * x))`.
    seen = torch.mm(weight, (x.unsqueeze(1) * a).flatten(0, 1).t()).view(len(weight), len(x), len(a))
    return (seen * b.unsqueeze(1)).sum(-1).t()
