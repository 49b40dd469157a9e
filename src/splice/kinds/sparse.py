"""The kind whose update of a weight is zero but for some entries, which an adapter holds with their places."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from splice.kinds.casting import cast_to, check_values
from splice.kinds.weight_delta import WeightDelta


class Entries(NamedTuple):
    """The entries of an update of a weight (out, in); those of one place add up."""

    # (n)
    values: torch.Tensor
    # (n), whole numbers below `out`.
    rows: torch.Tensor
    # (n), whole numbers below `in`.
    columns: torch.Tensor


class SparseUpdate(WeightDelta):
    """The kind `y + scale * S x` of linear layers, where S (out, in) has few entries that are not zero."""

    def changes(self) -> Entries:
        """The entries of the unscaled update, as they are now."""
        raise NotImplementedError

    def update(self) -> torch.Tensor:
        return self._dense(self.changes())

    def _dense(self, entries: Entries, dtype: torch.dtype | None = None) -> torch.Tensor:
        size_out, size_in = self.shape
        # As int64: a large layer has more entries than the int32 of a checkpoint can count.
        places = entries.rows.long() * size_in + entries.columns
        values = entries.values if dtype is None else entries.values.to(dtype)
        return values.new_zeros(size_out * size_in).index_add(0, places, values).view(size_out, size_in)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        entries, (size_out, size_in) = self.changes(), self.shape
        # Entry by entry for the few tokens of a decoding step. For more of them the product with a whole matrix is faster,
        # from about this number on; torch's own sparse matrices do not train on all devices.
        tokens = math.prod(x.shape[:-1])
        if 4 * tokens * len(entries.values) > size_out * size_in:
            check_values(entries.values, x)
            # In the precision of the input and not of the values: in float32 it would cost several times the base's product,
            # and what rounding the values changes is less than what rounding the output does.
            return F.linear(x, self._dense(entries, x.dtype))
        rows = cast_to(x, entries.values).reshape(tokens, size_in)
        products = rows.index_select(1, entries.columns) * entries.values
        # With int32, which checkpoints hold, torch adds the entries one call at a time: twenty times slower.
        summed = products.new_zeros(tokens, size_out).index_add(1, entries.rows.long(), products)
        return summed.view(*x.shape[:-1], size_out)
