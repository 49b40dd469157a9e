"""The kind `base(transform(x))`: what the base layer gets is another input."""

from __future__ import annotations

from typing import ClassVar

import torch

from splice.kinds.layer import AdapterLayer


class InputTransform(AdapterLayer):
    """The kind `base(transform(x))`. Of several, the first active one is the first that the input meets."""

    mergeable = True
    keeps_input = False
    first_outside: ClassVar[bool] = True

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """The input that the base layer gets in the place of `x`, (..., in), and of its shape and dtype."""
        raise NotImplementedError

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return self.transform(x)
