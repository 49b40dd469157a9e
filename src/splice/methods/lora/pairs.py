"""The factors A and B of all LoRA layers of a model, for optimizers that treat the two differently."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from splice.base.layers import LayerKind, kind_of
from splice.kinds.host import host_of
from splice.kinds.layer import AdapterLayer
from splice.methods.lora.layers import LowRank
from splice.methods.lora.parameters import LoraParameters


class Pair(NamedTuple):
    """A and B of one update, and how they are read as E stacked matrices; E is 1 but on a parameter of stacked experts."""

    # The adapter layer that has them, where FSDP, `.to` and `load_state_dict` may exchange them.
    layer: AdapterLayer
    # Suffixes of A and B.
    names: tuple[str, str]
    # E.
    experts: int

    @property
    def a(self) -> torch.Tensor:
        return self.layer.tensor(self.names[0])

    @property
    def b(self) -> torch.Tensor:
        return self.layer.tensor(self.names[1])

    @property
    def scale(self) -> float:
        """What B A is multiplied with, now."""
        if isinstance(self.layer, LoraParameters):
            return next(t.scale for t in self.layer.targets if f"{t.front}lora_A.weight" == self.names[0])
        assert isinstance(self.layer, LowRank)
        return float(self.layer.scale)

    @property
    def is_linear(self) -> bool:
        """Whether both are matrices that inputs are multiplied with, and neither a table nor a kernel."""
        return self.a.dim() == self.b.dim() == 2 and kind_of(self.layer.base) is not LayerKind.EMBEDDING

    def stacked_a(self, tensor: torch.Tensor) -> torch.Tensor:
        """A, or its gradient, as (E, r, in) in float32; of a convolution `in` holds the kernel too."""
        rank = tensor.shape[0] // self.experts
        return tensor.float().reshape(self.experts, rank, -1)

    def stacked_b(self, tensor: torch.Tensor) -> torch.Tensor:
        """B, or its gradient, as (E, out, r) in float32."""
        rank = tensor.shape[1] // self.experts
        return tensor.float().reshape(tensor.shape[0], rank, self.experts).permute(2, 0, 1)

    def like_a(self, stacked: torch.Tensor) -> torch.Tensor:
        """What `stacked_a` made of a tensor, back in the shape and dtype of A."""
        return stacked.reshape(self.a.shape).to(self.a.dtype)

    def like_b(self, stacked: torch.Tensor) -> torch.Tensor:
        """What `stacked_b` made of a tensor, back in the shape and dtype of B."""
        return stacked.permute(1, 2, 0).reshape(self.b.shape).to(self.b.dtype)


def pairs_of(model: nn.Module) -> list[Pair]:
    """Those of every adapter on `model`, once each where layers share them."""
    found: dict[int, Pair] = {}
    for module in model.modules():
        host = host_of(module)
        for layer in () if host is None else host.layers.values():
            for pair in _pairs(layer):
                found.setdefault(id(pair.b), pair)
    return list(found.values())


def _pairs(layer: AdapterLayer) -> Iterator[Pair]:
    if isinstance(layer, LoraParameters):
        for target in layer.targets:
            names = f"{target.front}lora_A.weight", f"{target.front}lora_B.weight"
            yield Pair(layer, names, target.experts)
    elif isinstance(layer, LowRank):
        yield Pair(layer, layer.factor_names, 1)
