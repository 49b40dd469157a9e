"""The kind `transform(base(x))`: what the base layer gives is made into another output."""

from __future__ import annotations

import torch

from splice.kinds.layer import AdapterLayer


class OutputTransform(AdapterLayer):
    """The kind `transform(base(x))`. Of several, the first active one is the first that the output meets.

    Together with `InputTransform`, named before it, it is a kind as well: `transform_output(base(transform(x)))`.
    """

    mergeable = True

    def transform_output(self, y: torch.Tensor) -> torch.Tensor:
        """The output in the place of `y`, (..., out), the bias included, and of its shape and dtype."""
        raise NotImplementedError

    def after(self, y: torch.Tensor) -> torch.Tensor:
        return self.transform_output(y)
