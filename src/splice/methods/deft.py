"""DEFT: what a layer gives in a few trained directions is taken out, and something trained is put in its place.

Kumar et al., "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models", NeurIPS 2025; without the second half
it is PaRa. With L (out, r) the directions and K what projects on them: `ΔW = L (s R - K^T W)`. Two forms: L = P and
K = relu(P), or both the Q of P's QR decomposition. `K^T W x` is worked out from what the base layer gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import LayerKind, features, kind_of
from splice.checkpoint.types import PeftType
from splice.kinds.dropout import dropout_of
from splice.kinds.effect import Forward
from splice.kinds.original import gets_base_output, original_weight, tensor_in_use
from splice.kinds.registry import Method, register
from splice.kinds.scale import add_scaled
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.kinds.weight_delta import WeightUpdate
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted, check_positive


@dataclass
class DeftConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.DEFT
    rank_field = "r"

    # The number of directions r, at least 1; a layer with fewer outputs has as many as it has outputs.
    r: int = 8
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # How the directions and their projection follow from P: "relu" or "qr".
    decomposition_method: Literal["relu", "qr"] = "relu"
    # The factor of the standard deviation of R, 0.02, where it is drawn.
    init_scale: float = 1.0
    # alpha, the numerator of the factor of R: s = alpha / r; None or 0 for s = 1.
    alpha: int | None = None
    # Whether nothing is put in the place of what is taken out: then there is no R, and a new adapter changes the output.
    para: bool = False
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides, and sets this field.
    fan_in_fan_out: bool = False
    # Probability with which each input of R is set to zero in training, 0 to 1.
    deft_dropout: float = 0.0
    # Whether R starts as what is taken out, so that nothing changes at first; otherwise it is drawn.
    init_weights: bool = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # Biases of the base to train with the adapter: "none", "all", or "deft_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decomposition_method not in ("relu", "qr"):
            raise ValueError(f"Unknown `decomposition_method` {self.decomposition_method!r}: it is 'relu' or 'qr'")

    def computed(self) -> dict[str, object]:
        return {"decomposition_method": self.decomposition_method, "alpha": self.alpha or None}


def _check(config: DeftConfig) -> None:
    check_positive(r=config.r)


def _projector(p: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """L and K, (out, r), in float32 at least."""
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    if form == "relu":
        return p, F.relu(p)
    q = torch.linalg.qr(p).Q
    return q, q


class DeftLayer(WeightUpdate):
    """DEFT on a linear layer, stored either way round. All is computed in float32, whatever the base's dtype."""

    deft_P = Held()
    numbers = MappingProxyType({"deft_r": "r", "deft_scaling": "share"})
    # A forward does without the weight, unless other adapters stand between this one and the base.
    reads_weight = False
    starts_from_weight = True

    @classmethod
    def slots(cls, base: nn.Module, config: DeftConfig, path: str) -> dict[str, Slot]:
        size_in, size_out = features(base)
        r = min(config.r, size_out)
        return {"deft_P": Slot((size_out, r)), **({} if config.para else {"deft_R": Slot((r, size_in))})}

    @classmethod
    def resolved(cls, base: nn.Module, config: DeftConfig) -> dict[str, object]:
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: DeftConfig) -> None:
        p, weight = tensors["deft_P"], original_weight(base)
        nn.init.normal_(p, std=0.02)
        if config.para:
            return
        if config.init_weights and not weight.is_meta:
            _, k = _projector(p, config.decomposition_method)
            tensors["deft_R"].copy_(k.T @ weight.to(k) / _share(config, p))
        else:
            nn.init.normal_(tensors["deft_R"], std=0.02 * config.init_scale)

    def prepare(self, base: nn.Module, config: DeftConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.r, self.dropout = self.deft_P.shape[1], config.deft_dropout
        self.form, self.share = config.decomposition_method, _share(config, self.deft_P)

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        y: torch.Tensor = inner(x)
        left, k = _projector(self.deft_P, self.form)
        inside = -(self._bare(x, y).to(left.dtype) @ k)
        r = self.find("deft_R")
        if r is not None:
            h = x.to(left.dtype)
            if self.dropout and self.training:
                h = F.dropout(h, self.dropout)
            inside = add_scaled(inside, F.linear(h, r.to(left.dtype)), self.share)
        return (y.to(left.dtype) + F.linear(inside, left)).to(x.dtype)

    def _bare(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What the base gives for `x` without adapters and without its bias, where `y` is what this one is put around."""
        if not gets_base_output(self):
            weight = original_weight(self.base)
            return F.linear(x.to(weight.dtype), weight)
        own = self.trained_bias
        bias = tensor_in_use(self.base, "bias", self) if own is None else own
        return y if bias is None else y.to(torch.promote_types(y.dtype, torch.float32)) - bias

    def update_of(self, weight: torch.Tensor) -> torch.Tensor:
        left, k = _projector(self.deft_P, self.form)
        inside = -(k.T @ weight.to(k.dtype))
        r = self.find("deft_R")
        return left @ (inside if r is None else add_scaled(inside, r.to(left.dtype), self.share))


def _share(config: DeftConfig, p: torch.Tensor) -> float:
    """The factor of R."""
    return config.alpha / p.shape[1] if config.alpha else 1.0


METHOD = register(
    Method(
        name=PeftType.DEFT,
        summary="Takes out what a layer gives in a few trained directions, and puts something trained in its place.",
        config=DeftConfig,
        prefix="deft_",
        tensor_names=frozenset({"deft_P", "deft_R"}),
        layers=MappingProxyType({LayerKind.LINEAR: DeftLayer, LayerKind.TRANSPOSED_LINEAR: DeftLayer}),
        containers=("deft_P", "deft_R"),
        layer_views=MappingProxyType(
            {
                "deft_decomposition": lambda layer: layer.form,
                "deft_init_scale": lambda layer: layer.config.init_scale,
                "deft_para": lambda layer: layer.config.para,
                "deft_dropout": dropout_of,
            }
        ),
        default_targets=LORA_TARGETS,
        check=_check,
        names=MappingProxyType({"DeftLinear": DeftLayer}),
        paper="NeurIPS 2025",
    )
)
