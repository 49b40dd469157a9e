"""The cache of keys and values that a call goes on from, as far as virtual tokens ask of it."""

from __future__ import annotations

from typing import Protocol

import torch


class Cache(Protocol):
    """Keys and values of the tokens so far, as transformers has them; what is asked of them here."""

    @property
    def is_compileable(self) -> bool:
        """Whether its length is fixed."""
        ...

    def get_seq_length(self) -> int:
        """How many tokens it holds, the virtual ones among them."""
        ...

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> object:
        """Add keys and values (batch, heads, tokens, size of a head) to those of one layer."""
        ...
