"""GraLoRA: the weight is cut into a grid of blocks, and each has a low-rank update of its own.

Jung et al., "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", arXiv 2505.20355, section 3. With
k blocks each way and q = r / k, block n of the inputs adds to block j of the outputs `s * x_n A[n]_j B[j]_n`: the j-th q of
the r columns of A[n] meet the n-th q rows of B[j]. The hybrid adds a plain LoRA. s = alpha / (r + hybrid_r).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.dtypes import HALVES
from splice.base.layers import LayerKind, features, kind_of
from splice.checkpoint.types import PeftType
from splice.kinds.additive import Additive
from splice.kinds.as_one import Alike
from splice.kinds.casting import cast_to
from splice.kinds.dropout import dropout_of
from splice.kinds.effect import Forward
from splice.kinds.registry import Method, register
from splice.kinds.scale import add_scaled
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted, check_positive


@dataclass
class GraloraConfig(Targeted):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: `gralora_k` is below 1, or does not divide `r`.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.GRALORA
    rank_field = "r"
    scale_fields = ("alpha", "r", "hybrid_r")

    # Rank r of all blocks of a row or column of the grid together, at least 1; `gralora_k` divides it.
    r: int = 32
    # Rank of the plain LoRA beside the blocks; 0 for none.
    hybrid_r: int = 0
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # alpha, the numerator of the scale.
    alpha: int = 64
    # Probability with which each input of the update is set to zero in training, 0 to 1.
    gralora_dropout: float = 0.0
    # k, the number of blocks each way: it divides the inputs and the outputs of each layer.
    gralora_k: int = 2
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides, and sets this field.
    fan_in_fan_out: bool = False
    # Biases of the base to train with the adapter: "none", "all", or "gralora_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Whether B starts at zero, so that nothing changes at first; otherwise it is random as A is.
    init_weights: bool = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gralora_k <= 0:
            raise ValueError(f"`gralora_k` should be a positive integer value but the value passed is {self.gralora_k}")
        if self.r % self.gralora_k:
            raise ValueError(f"r should be divisible by gralora_k, but got r={self.r} and gralora_k={self.gralora_k}")

    def computed(self) -> dict[str, object]:
        return {"alpha": self.alpha, "gralora_k": self.gralora_k}


def _check(config: GraloraConfig) -> None:
    check_positive(r=config.r)
    if config.hybrid_r < 0:
        raise ValueError(f"`hybrid_r` should be a non-negative integer value but the value passed is {config.hybrid_r}")


class GraloraLayer(Alike, Additive):
    """GraLoRA on a linear layer, stored either way round."""

    least = 16
    numbers = MappingProxyType(
        {
            **Additive.numbers,
            "hybrid_r": "hybrid_r",
            "alpha": "alpha",
            "gralora_k": "gralora_k",
        }
    )
    gralora_A, gralora_B = Held(), Held()

    @classmethod
    def slots(cls, base: nn.Module, config: GraloraConfig, path: str) -> dict[str, Slot]:
        (size_in, size_out), k = features(base), config.gralora_k
        for size, what in ((size_in, "in_features"), (size_out, "out_features")):
            if size % k:
                raise ValueError(
                    f"{path}: {what} should be divisible by gralora_k, but got {what}={size} and gralora_k={k}. Choose "
                    "another `gralora_k`, or leave the layer out of the targets."
                )
        found = {"gralora_A": Slot((k, size_in // k, config.r)), "gralora_B": Slot((k, config.r, size_out // k))}
        if config.hybrid_r:
            found["gralora_A_general.weight"] = Slot((config.hybrid_r, size_in))
            found["gralora_B_general.weight"] = Slot((size_out, config.hybrid_r))
        return found

    @classmethod
    def resolved(cls, base: nn.Module, config: GraloraConfig) -> dict[str, object]:
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: GraloraConfig) -> None:
        zero = config.init_weights
        for a, b in zip(tensors["gralora_A"], tensors["gralora_B"]):
            _draw(a.T)
            nn.init.zeros_(b) if zero else _draw(b.T)
        if config.hybrid_r:
            a, b = tensors["gralora_A_general.weight"], tensors["gralora_B_general.weight"]
            _draw(a)
            nn.init.zeros_(b) if zero else _draw(b)

    def prepare(self, base: nn.Module, config: GraloraConfig, path: str) -> None:
        self.r, self.hybrid_r, self.alpha, self.gralora_k = config.r, config.hybrid_r, config.alpha, config.gralora_k
        self.scale = self.initial_scale = config.alpha / (config.r + config.hybrid_r)
        self.dropout = config.gralora_dropout

    def likeness(self) -> Hashable:
        return None if isinstance(self.scale, torch.Tensor) else (self.scale, self.r, self.gralora_k)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.gralora_A)

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        y: torch.Tensor = inner(x)
        h = self.cast_input(x)
        out = add_scaled(y, self._of_blocks(self._dropped(h)), self.scale)
        a, b = self.find("gralora_A_general.weight"), self.find("gralora_B_general.weight")
        if a is not None and b is not None:  # which has a dropout of its own
            out = add_scaled(out, F.linear(F.linear(self._dropped(h), a), b), self.scale)
        return out if out.dtype is y.dtype else out.to(y.dtype)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def _of_blocks(self, x: torch.Tensor) -> torch.Tensor:
        a, b, k = self.gralora_A, self.gralora_B, self.gralora_k
        # (k, rows, in / k), then (block of inputs, rows, block of outputs, q) of what A gives.
        cut = x.reshape(math.prod(x.shape[:-1]), k, a.shape[1]).transpose(0, 1)
        hidden = (cut @ a).view(*cut.shape[:2], k, a.shape[2] // k)
        met = hidden.permute(2, 1, 0, 3).flatten(
            2
        )  # each block of outputs takes its q columns of every block of inputs
        return (met @ b).transpose(0, 1).reshape(*x.shape[:-1], k * b.shape[2])

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        a, b = _wide(self.gralora_A), _wide(self.gralora_B)
        k = self.gralora_k
        blocks = torch.einsum("nijq,jnqo->joni", a.view(k, a.shape[1], k, -1), b.view(k, k, -1, b.shape[2]))
        update = blocks.reshape(k * b.shape[2], k * a.shape[1])
        a_general, b_general = self.find("gralora_A_general.weight"), self.find("gralora_B_general.weight")
        if a_general is not None and b_general is not None:
            update = update + _wide(b_general) @ _wide(a_general)
        return self.scale * update


def _draw(matrix: torch.Tensor) -> None:
    """Fill a matrix (out, in), wherever its values lie, with the numbers that a new one of its shape would get."""
    matrix.copy_(nn.init.kaiming_uniform_(torch.empty(matrix.shape, dtype=matrix.dtype), a=math.sqrt(5)))


def _wide(factor: torch.Tensor) -> torch.Tensor:
    """Half-precision factors on the CPU in float32: their product is rounded once, by whoever adds it."""
    return factor.float() if factor.device.type == "cpu" and factor.dtype in HALVES else factor


METHOD = register(
    Method(
        name=PeftType.GRALORA,
        summary="Cuts a weight into a grid of blocks and gives each a low-rank update of its own.",
        config=GraloraConfig,
        prefix="gralora_",
        tensor_names=frozenset({"gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"}),
        layers=MappingProxyType({LayerKind.LINEAR: GraloraLayer, LayerKind.TRANSPOSED_LINEAR: GraloraLayer}),
        containers=("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"),
        layer_views=MappingProxyType({"gralora_dropout": dropout_of}),
        default_targets=LORA_TARGETS,
        check=_check,
        paper="arXiv 2505.20355",
    )
)
