"""The kind `base(transform(x))`: what the base layer gets is another input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from splice.kinds.effect import Forward
from splice.kinds.layer import AdapterLayer


class InputTransform(AdapterLayer):
    """The kind `base(transform(x))`. Of several, the first active one is the first that the input meets."""

    mergeable = True
    keeps_input = False
    first_outside: ClassVar[bool] = True

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """The input that the base layer gets, of the shape and dtype of `x`."""
        raise NotImplementedError

    def around(self, x: torch.Tensor, inner: Forward) -> Any:
        return inner(self.transform(x))
