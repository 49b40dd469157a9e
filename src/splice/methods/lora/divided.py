"""LoRA on layers that tensor parallelism divides: each process has a part of the weight, and of the factor beside it.

Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3. Where a process has rows of the weight (out / n, in), it has these
rows of B, and all of A; where it has columns (out, in / n), it has those columns of A, and all of B. So what is sent is the
hidden vector of r numbers: its sum forward over columns, the sum of its gradients backward over rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.collectives import joined, summed, with_summed_gradients
from splice.base.layers import LayerKind, kind_of
from splice.base.sharding import divided_dim, empty_divided, is_divided, local, mesh_group, part_of, sharded_dim
from splice.errors import UnsupportedLayerError
from splice.kinds.effect import Forward
from splice.kinds.scale import add_scaled
from splice.kinds.slot import Slot
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.layers import OnEmbedding, OnLinear

# The dimension in which a tensor is divided, by the dimension in which the weight is; others are copies.
_DIVIDED: Mapping[int, Mapping[str, int]] = MappingProxyType(
    {0: {"lora_B.weight": 0, "lora_B.bias": 0}, 1: {"lora_A.weight": 1}}
)


class DividedLinear(OnLinear):
    """LoRA on a linear layer of which each process has rows (colwise) or columns (rowwise)."""

    divides = True

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        if kind_of(base) is not LayerKind.LINEAR or divided_dim(base) not in _DIVIDED:
            raise UnsupportedLayerError(
                f"{path}: its weight is divided among processes in a way that LoRA does not follow here (it does where each "
                "has whole rows, or whole columns, on a mesh of one dimension). Leave it out of the targets, or put the "
                "adapter on before the model is divided."
            )
        return super().slots(base, config, path)

    @classmethod
    def template(cls, base: nn.Module, suffix: str, slot: Slot) -> torch.Tensor:
        dim = divided_dim(base)
        assert dim is not None
        return empty_divided(base, slot.shape, _DIVIDED[dim].get(suffix))

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        # By its own factor: the weight is whole while a new adapter is made, and FSDP may divide it once more afterwards.
        self.has_rows = sharded_dim(self.b) == 0

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        y: torch.Tensor = inner(x)
        h = self.cast_input(x)
        if self.dropout and self.training:
            h = F.dropout(h, self.dropout)
        # torch's own `parallelize_module` hands tensors that are divided to the layer, and takes such back; transformers
        # hands and takes the process's own part.
        delta = self.delta(h) if is_divided(x) else self._own_delta(h, y.shape[-1])
        out = add_scaled(y, delta, self.scale)
        return out if out.dtype is y.dtype else out.to(y.dtype)

    def _own_delta(self, x: torch.Tensor, size_out: int) -> torch.Tensor:
        """The update of what this process has of the output, (..., size_out), which may be all of it."""
        group, bias = mesh_group(self.a), self.find("lora_B.bias")
        a, b = local(self.a), local(self.b)
        if self.has_rows:
            hidden = with_summed_gradients(F.linear(x, a), group)
            own = F.linear(hidden, b, None if bias is None else local(bias))
            return own if own.shape[-1] == size_out else joined(own, self._begin(self.b, 0), size_out, group)
        if x.shape[-1] != a.shape[-1]:  # of all of the input it takes its part itself
            x = with_summed_gradients(x, group).narrow(-1, self._begin(self.a, 1), a.shape[-1])
        hidden = summed(F.linear(x, a), group)
        return F.linear(hidden, b, None if bias is None else local(bias))

    @staticmethod
    def _begin(tensor: torch.Tensor, dim: int) -> int:
        part = part_of(tensor)
        assert part is not None
        return part.offset[dim]


class DividedEmbedding(OnEmbedding):
    """LoRA on an embedding that is divided: its factors are small, and every process has all of them."""

    divides = True

    @classmethod
    def template(cls, base: nn.Module, suffix: str, slot: Slot) -> torch.Tensor:
        # Divided in no dimension, yet of the same class as its neighbours': optimizers take no mixture of the two.
        return empty_divided(base, slot.shape, None)

    def down(self, x: torch.Tensor) -> torch.Tensor:
        return F.embedding(x, local(self.a).T, *self.look_up)

    def up(self, hidden: torch.Tensor) -> torch.Tensor:
        found = hidden @ local(self.b).T
        return found if self.embed_scale == 1.0 else found * self.embed_scale
