"""The tensors of a base layer as they are without adapters, for methods whose mathematics needs them in a forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from splice.base.dense import in_linear_layout


class Original:
    """A base layer's own tensors, looked up at every use: they may have been moved, replaced, or merged into since.

    It is no module, so the base layer does not come up a second time below the adapter layer that keeps this.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def tensor(self, name: str) -> torch.Tensor | None:
        """The tensor as the base stores it; the one before the first merge, while adapters are merged."""
        own = self.layer._parameters[name]
        host = self.layer.__dict__.get("splice_host")
        return own if host is None or not host.originals else host.originals.get(name, own)

    def weight(self) -> torch.Tensor:
        """The weight, (out, in) if the layer is linear; without a graph."""
        weight = self.tensor("weight")
        assert weight is not None
        return in_linear_layout(self.layer, weight.detach())

    def shown(self, name: str) -> torch.Tensor | None:
        """What the base computes with now in place of its tensor: an active adapter may bring one of its own."""
        host: Any = self.layer.__dict__.get("splice_host")
        if host is not None and host.shows:
            for active in host.selection.current().names:
                layer = host.layers.get(active)
                found: Mapping[str, torch.Tensor] = {} if layer is None else layer.shown(self.layer)
                if name in found:
                    return found[name]
        return self.layer._parameters[name]
