"""The kind that routes: for each token it weighs what other adapters on the same layer add, and adds their sum.

`y + dropout(sum_e w_e(x) * scale_e * delta_e(x))`, with the weights w_e of each token for the experts e, which are adapters
of their own, loaded and trained under their own names. Which adapters count as experts, and the weights, are the method's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from splice.base.layers import LayerKind, kind_of
from splice.base.routing import gets_sorted_tokens
from splice.errors import UnsupportedFeatureError
from splice.kinds.additive import Additive
from splice.kinds.effect import Action, Forward
from splice.kinds.host import host_of
from splice.kinds.layer import AdapterLayer
from splice.kinds.scale import add_scaled
from splice.selection import Mixture

# Layers whose input has one place for each token.
_BY_TOKEN = (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR, LayerKind.EMBEDDING)


def weighed(
    expert: Additive, x: torch.Tensor, weights: torch.Tensor, total: torch.Tensor | None, drops: bool
) -> torch.Tensor:
    """`total` and what one expert adds to tokens of `x` with these weights (..., 1); `drops` some of their features."""
    h = expert.cast_input(x)
    if drops and expert.dropout and expert.training:
        h = nn.functional.dropout(h, expert.dropout)
    part = expert.weighted(h, weights)
    return part if total is None else total + part


def mixed(
    y: torch.Tensor, x: torch.Tensor, layers: Mapping[str, AdapterLayer], mixture: Mixture, path: str
) -> torch.Tensor:
    """`y` (..., out), what the base layer gives for `x`, and what the adapters of a mixture add to each token.

    Raises:
        ValueError: to which token a row of `x` belongs cannot be told.
    """
    weights, total = mixture.weights.get(path), None
    if weights is None:
        return y
    weights = _for_tokens(weights, x, path)
    for index, name in enumerate(mixture.names):
        expert = layers.get(name)
        if isinstance(expert, Additive):
            total = weighed(expert, x, weights[..., index : index + 1], total, drops=True)
    return y if total is None else add_scaled(y, total, mixture.scale).to(y.dtype)


def _for_tokens(weights: torch.Tensor, x: torch.Tensor, path: str) -> torch.Tensor:
    """(..., experts) for the tokens that `x`, (..., in) or token ids (...), consists of."""
    tokens = x.shape[:-1] if x.is_floating_point() else x.shape
    if tokens == weights.shape[:-1]:
        return weights
    if len(tokens) == 2 and tokens[0] == weights.shape[0] and tokens[1] < weights.shape[1]:
        return weights[:, weights.shape[1] - tokens[1] :]  # of the head, which may be given the last tokens alone
    if tokens.numel() == weights.shape[:-1].numel() and not gets_sorted_tokens(path):
        return weights.reshape(*tokens, weights.shape[-1])
    raise ValueError(
        f"{path}: its input {tuple(x.shape)} is not the {weights.shape[1]} tokens of {weights.shape[0]} rows that adapters "
        "are weighed for. The network sorts or pads them on the way here: leave this layer out of the experts."
    )


def check_can_be_mixed(layer: AdapterLayer, what: str, by: str) -> None:
    """Raise where an adapter layer is more than something that is added to each token.

    Raises:
        UnsupportedFeatureError: (a NotImplementedError) it is.
    """
    plain = isinstance(layer, Additive) and layer.action is Action.ADDS and not layer.shows
    if not plain or kind_of(layer.base) not in {*_BY_TOKEN}:
        raise UnsupportedFeatureError(
            f"{what} cannot be weighed token by token ({by}): that is for adapters that only add to linear layers and "
            f"embeddings, and this one is a {type(layer).__name__}."
        )


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
