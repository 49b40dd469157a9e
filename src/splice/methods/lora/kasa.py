"""KaSA: LoRA with trained singular values, beside a weight without its smallest ones.

Wang et al., "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", arXiv 2412.06071, section 4. With
W' the weight but for its r smallest singular values: `y = W' x + s * B (d * (A x))`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from splice.base.layers import features
from splice.errors import UnsupportedLayerError
from splice.kinds.adapters import Adapters, layers_of, names_or_active
from splice.kinds.effect import Effect, Factors
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.inits import Taken
from splice.methods.lora.layers import OnLinear, product
from splice.methods.lora.residual import Residual
from splice.methods.lora.subconfigs import KasaConfig, options_of


class KasaLinear(Residual, OnLinear):
    """KaSA on a linear layer."""

    lora_diag = Held()
    beta: float
    gamma: float

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        rank, most = cls.rank(config, path), min(features(base))
        if rank >= most:
            raise UnsupportedLayerError(
                f"{path}: KaSA leaves out {rank} singular values of a weight that has {most}. Lower the rank."
            )
        return {**super().slots(base, config, path), "lora_diag": Slot((rank,))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        super().initialise(tensors, base, config)
        nn.init.normal_(tensors["lora_diag"])

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        options = options_of(config.kasa_config, KasaConfig)
        self.beta, self.gamma = options.beta, options.gamma

    def taken(self, weight: torch.Tensor) -> Taken:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        kept = len(s) - self.r
        return Taken(vh[kept:], u[:, kept:] * s[kept:], 1.0)

    def down(self, x: torch.Tensor) -> torch.Tensor:
        return super().down(x) * self.lora_diag

    def plain(self) -> Factors:
        found = super().plain()
        own, taken = found.b[:, : -self.r], found.b[:, -self.r :]
        # With a scale of zero nothing but what is taken out is left.
        return found if not self.scale else found._replace(b=torch.cat([own * self.lora_diag, taken], dim=1))

    def own_update(self) -> torch.Tensor:
        return self.scale * product(self.b * self.lora_diag, self.a)

    def conflict(self, other: Effect) -> str:
        return "each leaves singular values of the weight out" if isinstance(other, Residual) else ""

    def penalty(self) -> torch.Tensor:
        """What training adds to the loss for this layer: small singular values, and A and B close to being orthogonal."""
        a, b = self.a.float(), self.b.float()
        identity = torch.eye(self.r, device=a.device)
        apart = torch.linalg.matrix_norm(b.T @ b - identity) + torch.linalg.matrix_norm(a @ a.T - identity)
        found: torch.Tensor = self.beta * self.lora_diag.float().square().sum() + self.gamma * apart
        return found


def kasa_loss(adapters: Adapters, adapter_names: str | Iterable[str] | None = None) -> torch.Tensor | float:
    """The sum of KaSA's penalties, for a training loop to add to its loss; 0.0 where there is none.

    Args:
        adapters: found on the model.
        adapter_names: of these adapters; of the active ones, if None.
    """
    names = names_or_active(adapters, adapter_names)
    penalties = [layer.penalty() for name in names for layer in layers_of(adapters, [name], KasaLinear).values()]
    return sum(penalties[1:], start=penalties[0]) if penalties else 0.0
