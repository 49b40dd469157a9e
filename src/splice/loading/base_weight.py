"""The weight of a base layer as it is without any adapter."""

from __future__ import annotations

import torch
from torch import nn

from splice.kinds.original import original_tensor


def base_weight(layer: nn.Module) -> torch.Tensor | None:
    """The weight of `layer` as it was before an adapter was merged into it; None where it has none."""
    return original_tensor(layer, "weight") if "weight" in layer._parameters else None
