"""The shadow network of transformers for diffusion: what it makes of a token follows from that token alone."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn


class TokenMLP(nn.Module):
    """`s = proj_in(x)`, then for each layer `s += mlp(norm(s))`.

    Args:
        size_in: features of x.
        size: of s.
        inner: width of the layers.
        layers: how many there are.
    """

    def __init__(self, size_in: int, size: int, inner: int, layers: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(size_in, size)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size))
            for _ in range(layers)
        )

    def forward(self, inputs_embeds: torch.Tensor) -> tuple[torch.Tensor]:
        """(batch, T, size) of (batch, T, size_in), in a tuple as networks of transformers give it."""
        s = cast(torch.Tensor, self.proj_in(inputs_embeds))
        for block in self.blocks:
            s = s + block(s)
        return (s,)
