"""The weight of a base layer as it is without any adapter."""

from __future__ import annotations

import torch
from torch import nn

from splice.surgery.adapted_layer import Adapted


def base_weight(layer: nn.Module) -> torch.Tensor | None:
    """The weight of `layer` as it was before an adapter was merged into it; None where it has none."""
    weight = layer._parameters.get("weight")
    return layer.splice_host.originals.get("weight", weight) if isinstance(layer, Adapted) else weight
