"""LoHa: the update of a weight is the elementwise (Hadamard) product of two low-rank matrices.

Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", arXiv 2108.06098,
sections 2.1 and 2.2. With s = alpha / r: `ΔW = s * (W1a W1b) * (W2a W2b)`, in the shape of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, TypeAlias

import torch
from torch import nn

from splice.base.layers import LayerKind
from splice.checkpoint.types import PeftType
from splice.kinds.as_one import Alike
from splice.kinds.casting import cast_to
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.lycoris.layers import LycorisLayer, check, core_shape, draw, product, rank_of, sizes
from splice.methods.targeted import Targeted


@dataclass
class LoHaConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.LOHA
    # Beside a regular expression as `target_modules`, `layers_to_transform` is no error here; it has no effect.
    index_needs_names: ClassVar[bool] = False
    pattern_fields = MappingProxyType({"rank_pattern": "r", "alpha_pattern": "alpha"})

    # Ranks of single layers: a regular expression for the end of a path -> its r. The first that matches counts.
    rank_pattern: dict[str, int] = field(default_factory=dict)
    # The same for alpha.
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    # Rank r of both products, W1a W1b and W2a W2b, at least 1.
    r: int = 8
    # alpha, the numerator of the scale: s = alpha / r.
    alpha: int = 8
    # Probability with which a row of the update (an output of the layer) is left out in training; the rest is scaled up.
    rank_dropout: float = 0.0
    # Probability with which a layer's whole update is left out of a call in training, 0 to 1.
    module_dropout: float = 0.0
    # Whether the factors of a convolution with a kernel larger than 1 are joined by a core (r, r, *kernel); otherwise the
    # kernel's axes lie in W1b and W2b.
    use_effective_conv2d: bool = False
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # Whether W2b starts at zero, so that nothing changes at first; otherwise all factors are random.
    init_weights: bool = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None

    def computed(self) -> dict[str, object]:
        return {"alpha": self.alpha}


class LoHaLayer(Alike, LycorisLayer):
    """LoHa on a linear layer or a convolution; of a convolution either a plain product or one through a core."""

    broadcasts = True
    hada_w1_a, hada_w1_b = Held("hada_w1_a"), Held("hada_w1_b")
    hada_w2_a, hada_w2_b = Held("hada_w2_a"), Held("hada_w2_b")

    @classmethod
    def slots(cls, base: nn.Module, config: LoHaConfig, path: str) -> dict[str, Slot]:
        (size_in, size_out, kernel), r = sizes(base), rank_of(config, path)
        core = core_shape(config, r, kernel)
        a, b = ((r, size_out), (r, size_in)) if core else ((size_out, r), (r, size_in * math.prod(kernel)))
        factors: dict[str, tuple[int, ...]] = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
        shapes = {**factors, "hada_t1": core, "hada_t2": core} if core else factors
        return {suffix: Slot(shape) for suffix, shape in shapes.items()}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoHaConfig) -> None:
        draw(tensors, zero=("hada_w2_b",) if config.init_weights else ())

    def likeness(self) -> Hashable:
        # Of larger ones copying all factors takes longer than what is done for each adapter.
        small = len(self.shape) == 2 and self.r * max(self.shape) <= 4096
        return self.scale if small and not isinstance(self.scale, torch.Tensor) else None

    def directly(self, x: torch.Tensor) -> torch.Tensor | None:
        several = self.hada_w1_a.dim() > 2
        return self._by_pairs(x) if several else super().directly(x)

    def applied(self, x: torch.Tensor) -> torch.Tensor | None:
        # Two ranks for each row and feature, where the update has one product for each entry of the weight. For one row it is
        # ten times faster on a layer of 512 features, and a thousand times on one of 4096; about here both take as long.
        return None if len(x) * self.r > min(self.shape) else self._by_pairs(x)

    def _by_pairs(self, x: torch.Tensor) -> torch.Tensor:
        """`applied` for `x` (..., rows, in), of one layer or of several."""
        a1, b1, a2, b2 = self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b
        # y_o = sum over r, s of a1_or a2_os (b1 diag(x) b2^T)_rs: (rows * r, in) and (in, r), then (out, r) and (rows, r, r).
        spread = (cast_to(x, b1).unsqueeze(-2) * b1.unsqueeze(-3)).flatten(-3, -2)
        middle = (spread @ b2.mT).view(*x.shape[:-1], self.r, self.r)
        return torch.sum((a1.unsqueeze(-3) @ middle) * a2.unsqueeze(-3), -1)

    def update(self) -> torch.Tensor:
        core1, core2 = self.find("hada_t1"), self.find("hada_t2")
        a1, b1, a2, b2 = self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b
        if core1 is None or core2 is None or not torch.is_grad_enabled():
            return (product(a1, b1, core1) * product(a2, b2, core2)).reshape(self.shape)
        one, two = (a1, b1, core1), (a2, b2, core2)
        return (_as_trained(one, two) * _as_trained(two, one)).reshape(self.shape)


# (r, out), (r, in) and the core (r, r, *kernel).
_Factors: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
        summary="Adds to a weight the elementwise (Hadamard) product of two low-rank matrices.",
        config=LoHaConfig,
        prefix="hada_",
        tensor_names=frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}),
        layers=MappingProxyType(
            {LayerKind.LINEAR: LoHaLayer, LayerKind.CONV1D: LoHaLayer, LayerKind.CONV2D: LoHaLayer}
        ),
        containers=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        # The reference has it for LoKr, and empty for LoHa.
        layer_views=MappingProxyType({"rank_dropout_scale": lambda layer: None}),
        default_targets=LORA_TARGETS,
        check=check,
        paper="arXiv 2108.06098",
    )
)
