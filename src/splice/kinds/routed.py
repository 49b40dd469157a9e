"""The kind that routes: for each token it weighs what other adapters on the same layer add, and adds their sum.

`y + dropout(sum_e w_e(x) * scale_e * delta_e(x))`, with the weights w_e of each token for the experts e, which are adapters
of their own, loaded and trained under their own names. Which adapters count as experts, and the weights, are the method's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from splice.kinds.additive import Additive
from splice.kinds.effect import Forward
from splice.kinds.host import host_of
from splice.kinds.layer import AdapterLayer
from splice.kinds.scale import add_scaled


class Routed(AdapterLayer):
    """An adapter layer that mixes those of other adapters on its base layer, token by token."""

    # Probability with which a feature of the mixture is dropped, in training.
    dropout_after: float = 0.0
    # What the mixture is multiplied with.
    mixture_scale: float = 1.0

    def experts(self, layers: Mapping[str, AdapterLayer]) -> Mapping[str, Additive]:
        """Those of the adapter layers on the base layer that are mixed, by adapter name.

        Raises:
            ValueError: one that should be is missing, or cannot be mixed.
        """
        raise NotImplementedError

    def weights(self, x: torch.Tensor, experts: Mapping[str, Additive]) -> torch.Tensor:
        """(..., experts): how much each token of `x` (..., in), or of token ids (...), is given of each expert."""
        raise NotImplementedError

    def part(self, expert: Additive, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """(..., out): what one expert adds to tokens with these weights (..., 1)."""
        return expert.weighted(expert.cast_input(x), weights)

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        y: torch.Tensor = inner(x)
        host = host_of(self.base)
        assert host is not None
        experts = self.experts(host.layers)
        if not experts:
            return y
        weights = self.weights(x, experts)
        total: torch.Tensor | None = None
        for index, expert in enumerate(experts.values()):
            part = self.part(expert, x, weights[..., index : index + 1])
            total = part if total is None else total + part
        assert total is not None
        if self.dropout_after and self.training:
            total = nn.functional.dropout(total, self.dropout_after)
        return add_scaled(y, total, self.mixture_scale).to(y.dtype)
