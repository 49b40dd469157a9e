"""MiCA (arXiv 2604.01694): LoRA whose B is the least singular directions of the weight, and is never trained."""

from __future__ import annotations

import torch
from torch import nn

from splice.base.layers import features
from splice.errors import UnsupportedLayerError
from splice.kinds.original import original_weight
from splice.kinds.slot import Role, Slot
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.layers import LowRank, OnEmbedding, OnLinear


class Mica(LowRank):
    """What it shares on both kinds of layer. It stands before the LoRA layer of the kind."""

    starts_from_weight = True

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        rank, most = cls.rank(config, path), min(features(base))
        if rank > most:
            raise UnsupportedLayerError(f"{path}: MiCA takes {rank} directions of a weight that has {most}")
        found, fixed = super().slots(base, config, path), cls.factor_names[1]
        return {**found, fixed: found[fixed]._replace(role=Role.BUFFER)}

    def outward(self) -> torch.Tensor:
        """The base's weight, (out, in)."""
        return original_weight(self.base)

    @torch.no_grad()
    def begin(self) -> None:
        self.a.zero_()
        weight = self.outward()
        if not weight.is_meta:
            u, _, _ = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
            self.b.copy_(u[:, u.shape[1] - self.r :])


class MicaLinear(Mica, OnLinear):
    """MiCA on a linear layer, stored either way round."""


class MicaEmbedding(Mica, OnEmbedding):
    """MiCA on an embedding: the weight is its table, (dim, vocabulary)."""

    def outward(self) -> torch.Tensor:
        return super().outward().T
