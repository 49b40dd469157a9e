"""The head of a network that labels sequences, of which SHADOW has a copy of its own."""

from __future__ import annotations

import torch
from torch import nn

from splice.base.bare import bare_copy, own_tensors

_NAMES = ("score", "classifier")


def head_of(network: nn.Module) -> nn.Module | None:
    """The head; None where the network has none."""
    return next((network._modules[name] for name in _NAMES if network._modules.get(name) is not None), None)


def empty_head(head: nn.Module) -> nn.Module:
    """A copy of the head without values."""
    memo: dict[int, object] = {}
    for _, tensor in own_tensors(head):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return bare_copy(head, memo)
