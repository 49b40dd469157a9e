"""LoHa: the update of a weight is the elementwise (Hadamard) product of two low-rank matrices.

Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", arXiv 2108.06098,
sections 2.1 and 2.2. With s = alpha / r: `ΔW = s * (W1a W1b) * (W2a W2b)`, in the shape of the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn

from splice.base.layers import LayerKind
from splice.checkpoint.types import PeftType
from splice.kinds.registry import Method, register
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.lycoris import LycorisLayer, check, core_shape, draw, product, rank_of, sizes
from splice.methods.targeted import TargetedConfig


@dataclass
class LoHaConfig(TargetedConfig):
    """Fields and defaults of the reference, in its order."""

    method: ClassVar[PeftType] = PeftType.LOHA
    index_needs_names: ClassVar[bool] = False
    pattern_fields = MappingProxyType({"rank_pattern": "r", "alpha_pattern": "alpha"})

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None


class LoHaLayer(LycorisLayer):
    """LoHa on a linear layer or a convolution; of a convolution either a plain product or one through a core."""

    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter

    @classmethod
    def slots(cls, base: nn.Module, config: LoHaConfig, path: str) -> dict[str, tuple[int, ...]]:
        (size_in, size_out, kernel), r = sizes(base), rank_of(config, path)
        core = core_shape(config, r, kernel)
        a, b = ((r, size_out), (r, size_in)) if core else ((size_out, r), (r, size_in * math.prod(kernel)))
        factors: dict[str, tuple[int, ...]] = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
        return {**factors, "hada_t1": core, "hada_t2": core} if core else factors

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoHaConfig) -> None:
        draw(tensors, zero=("hada_w2_b",) if config.init_weights else ())

    def update(self) -> torch.Tensor:
        core1, core2 = self._parameters.get("hada_t1"), self._parameters.get("hada_t2")
        one, two = (self.hada_w1_a, self.hada_w1_b, core1), (self.hada_w2_a, self.hada_w2_b, core2)
        if core1 is None or core2 is None or not torch.is_grad_enabled():
            return (product(*one) * product(*two)).reshape(self.shape)
        return (_as_trained(one, two) * _as_trained(two, one)).reshape(self.shape)


_Factors: TypeAlias = tuple[torch.Tensor, torch.Tensor, Any]


def _as_trained(own: _Factors, other: _Factors) -> torch.Tensor:
    """The product of a convolution's factors, with the gradient that the reference gives its first one.

    That is worked out from the other product's core and last factor in place of its own. Trajectories of training, and so
    what is resumed, depend on it; values do not.
    """
    a, b, core = own
    seen = torch.einsum("ij...,jq->iq...", other[2], other[1]).detach()
    passed = torch.einsum("iq...,ip->pq...", seen, a)
    return product(a.detach(), b, core) + (passed - passed.detach())


METHOD = register(
    Method(
        name=PeftType.LOHA,
        config=LoHaConfig,
        prefix="hada_",
        tensor_names=frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}),
        layers=MappingProxyType(
            {LayerKind.LINEAR: LoHaLayer, LayerKind.CONV1D: LoHaLayer, LayerKind.CONV2D: LoHaLayer}
        ),
        default_targets=LORA_TARGETS,
        check=check,
        paper="arXiv 2108.06098",
    )
)
