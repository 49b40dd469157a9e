"""VeLoRA: LoRA that keeps one number for each group of A's inputs in memory for the backward, in place of the inputs.

Miles et al., "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections", arXiv 2405.17991, section 3. Outputs
are LoRA's; only the gradient of A is worked out from groups that are projected on one unit vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import features
from splice.kinds.slot import Role, Slot
from splice.kinds.tensors import Held
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.layers import OnLinear
from splice.methods.lora.subconfigs import VeloraConfig, options_of


class VeloraLinear(OnLinear):
    """VeLoRA on a linear layer, stored either way round."""

    lora_velora_embed = Held()

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        size = math.ceil(features(base)[0] / options_of(config.velora_config, VeloraConfig).num_groups)
        return {**super().slots(base, config, path), "lora_velora_embed": Slot((size,), Role.BUFFER)}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        super().initialise(tensors, base, config)
        vector = tensors["lora_velora_embed"]
        if options_of(config.velora_config, VeloraConfig).init_type == "random":
            vector.copy_(_unit(torch.randn(vector.shape)))
        else:
            vector.zero_()

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        options = options_of(config.velora_config, VeloraConfig)
        self.groups, self.backward_scale, self.init_type = options.num_groups, options.scale, options.init_type
        self.is_settled = options.init_type == "random"

    def down(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().down(x)
        if not self.is_settled:
            with torch.no_grad():
                self.lora_velora_embed.copy_(_unit(self._groups_of(x).float().mean((0, 1))))
            self.is_settled = self.init_type == "batch_average_once"
        return self._projected(x, self.a)

    def _groups_of(self, x: torch.Tensor) -> torch.Tensor:
        """`x` as (rows, groups, size of a group), padded with zeros."""
        return grouped(x, self.groups, len(self.lora_velora_embed))

    def _projected(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        apply: Callable[..., torch.Tensor] = _Projected.apply  # which has no types
        return apply(x, a, self.lora_velora_embed, self.groups, self.backward_scale)


class _Projected(torch.autograd.Function):
    """`x A^T`, which keeps the projections of the groups of `x` and not `x` itself."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, vector: torch.Tensor, groups: int, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(grouped(x, groups, len(vector)) @ vector.to(x.dtype), a, vector)
        ctx.scale = scale
        return F.linear(x, a)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        kept, a, vector = ctx.saved_tensors
        for_x = grad @ a if ctx.needs_input_grad[0] else None
        again = (kept.unsqueeze(-1) * vector.to(kept.dtype)).flatten(1)[:, : a.shape[1]] * ctx.scale
        for_a = grad.reshape(-1, a.shape[0]).T @ again if ctx.needs_input_grad[1] else None
        return for_x, for_a, None, None, None


def grouped(x: torch.Tensor, groups: int, size: int) -> torch.Tensor:
    """`x` (..., features) as (rows, groups, size), with zeros behind its features."""
    rows = x.reshape(-1, x.shape[-1])
    return F.pad(rows, (0, groups * size - rows.shape[1])).view(len(rows), groups, size)


def _unit(vector: torch.Tensor) -> torch.Tensor:
    """The vector at length 1; of zeros the one whose values are all alike."""
    wide = vector.float()
    return F.normalize(wide if wide.any() else torch.ones_like(wide), dim=0)
