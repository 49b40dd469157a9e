"""MiCA (arXiv 2604.01694): LoRA whose B is the least singular directions of the weight, and is never trained."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from splice.base.layers import features
from splice.errors import UnsupportedLayerError
from splice.kinds.original import Original
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.layers import LoraEmbedding, LoraLayer, LoraLinear


class Mica(LoraLayer):
    """What it shares on both kinds of layer. It stands before the LoRA layer of the kind."""

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, tuple[int, ...]]:
        rank, most = cls.rank(config, path), min(features(base))
        if rank > most:
            raise UnsupportedLayerError(f"{path}: MiCA takes {rank} directions of a weight that has {most}")
        return super().slots(base, config, path)

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.base = Original(base)

    def outward(self) -> torch.Tensor:
        """The base's weight, (out, in)."""
        return self.base.weight()

    @torch.no_grad()
    def begin(self) -> None:
        a, b = (dict(self.named_slots())[name] for name in self.names)
        a.zero_()
        weight = self.outward()
        if not weight.is_meta:
            u, _, _ = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
            b.copy_(u[:, u.shape[1] - self.r :])


class MicaLinear(Mica, LoraLinear):
    """MiCA on a linear layer, stored either way round."""

    frozen: ClassVar[frozenset[str]] = frozenset({"lora_B.weight"})


class MicaEmbedding(Mica, LoraEmbedding):
    """MiCA on an embedding: the weight is its table, (dim, vocabulary)."""

    frozen: ClassVar[frozenset[str]] = frozenset({"lora_embedding_B"})

    def outward(self) -> torch.Tensor:
        return super().outward().T
