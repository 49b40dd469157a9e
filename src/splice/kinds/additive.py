"""The kind `y + scale * delta(dropout(x))`: something is added to what the base layer gives."""

from __future__ import annotations

import torch
from torch import nn

from splice.kinds.effect import Action, Forward
from splice.kinds.layer import AdapterLayer
from splice.kinds.scale import Scale, add_scaled


class Additive(AdapterLayer):
    """The kind `y + scale * delta(dropout(x))`: LoRA and most of its relatives."""

    mergeable = True
    action = Action.ADDS
    # What the update is multiplied with.
    scale: Scale = 1.0
    # The scale that follows from the config, of layers whose scale scripts may change for a while; None of all others.
    initial_scale: float | None = None
    # Probability with which a feature of the input is dropped before the update sees it, in training.
    dropout: float = 0.0

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        """The unscaled update, (..., out), for `x` (..., in), which is in the dtype of the adapter's tensors already."""
        raise NotImplementedError

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        y: torch.Tensor = inner(x)
        h = self.cast_input(x)
        if self.dropout and self.training:
            h = nn.functional.dropout(h, self.dropout)
        out = add_scaled(y, self.delta(h), self.scale)
        return out if out.dtype is y.dtype else out.to(y.dtype)

    def weighted(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The scaled update, (..., out), where each token counts as much as its weight (..., 1) says.

        `x` is as in `delta`, and no feature of it is dropped.
        """
        return self.scale * weights * self.delta(x)

    def rescale(self, scale: Scale) -> None:
        """Multiply the update with `scale` from now on; where that is a tensor it stays the same one."""
        if isinstance(self.scale, torch.Tensor):
            self.scale.fill_(scale)
        else:
            self.scale = scale

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, of any shape, in the dtype of the adapter's own tensors."""
        raise NotImplementedError
