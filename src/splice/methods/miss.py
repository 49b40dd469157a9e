"""MiSS: one small block is shared by all shards of a layer's inputs.

Kang and Yin, "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing" (first "Bone"), arXiv 2409.15371.
The inputs are cut into shards of r, the last one filled up with zeros; with M (r, out) the block: `y = base(x) + (sum of the
shards) M`. In "mini" M has a few columns, which take turns. In "bat" the update is a function of the weight, block by block
of r times r: `W'_oi = W_oi (I + M_o) + M_o`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import LayerKind, features
from splice.checkpoint.types import PeftType
from splice.kinds.additive import Additive
from splice.kinds.casting import cast_to
from splice.kinds.dropout import dropout_of
from splice.kinds.effect import Forward
from splice.kinds.layer import AdapterLayer
from splice.kinds.reading import Checkpoint, Reading
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.kinds.weight_transform import WeightTransform
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted, check_positive


@dataclass
class MissConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.MISS
    rank_field = "r"
    # Before version 0.20 the method was called so, with fewer fields.
    former_names = frozenset({"BONE"})

    # r, how many inputs make a shard: at most those of the layer.
    r: int = 64
    # Probability with which each input of the update is set to zero in training, 0 to 1; not in "bat".
    miss_dropout: float = 0.0
    # The number of columns of the block in "mini": it divides the outputs of each layer.
    mini_r: int = 1
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # The variant, and how it starts: true for the plain one at zero, so that nothing changes at first, false for the plain
    # one at random; "mini" and "bat", both at zero. It is read at each load.
    init_weights: bool | str = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list on a layer's
    # path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # Biases of the base to train with the adapter: "none", "all", or "MiSS_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None

    def computed(self) -> dict[str, object]:
        return {"init_weights": self.init_weights if isinstance(self.init_weights, str) else "plain"}


def _check(config: MissConfig) -> None:
    check_positive(r=config.r, mini_r=config.mini_r)
    if config.init_weights not in (True, False, "bat", "mini"):
        raise ValueError(f"Unknown init_weights: {config.init_weights!r}; it is true, false, 'bat' or 'mini'.")


def _check_shard(base: nn.Module, config: MissConfig, path: str) -> None:
    size_in = features(base)[0]
    if config.r > size_in:
        raise ValueError(
            f"{path}: `r` is {config.r}, and the layer has {size_in} inputs: a shard cannot be larger. Lower `r`, or leave "
            "the layer out of the targets."
        )


class MissLayer(Additive):
    """MiSS on a linear layer: the block, (r, out), or (r, mini_r) in "mini"."""

    numbers = MappingProxyType({"miss_r": "r", "miss_mini_r": "mini_r"})
    miss_block = Held()

    @classmethod
    def slots(cls, base: nn.Module, config: MissConfig, path: str) -> dict[str, Slot]:
        _check_shard(base, config, path)
        columns = size_out = features(base)[1]
        if config.init_weights == "mini":
            columns = config.mini_r
            if size_out % columns:
                raise ValueError(
                    f"{path}: `mini_r` is {columns}, which divides not the layer's {size_out} outputs. Choose another one, "
                    "or leave the layer out of the targets."
                )
        return {"miss_block": Slot((config.r, columns))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: MissConfig) -> None:
        (block,) = tensors.values()
        if config.init_weights is False:
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        else:
            nn.init.zeros_(block)

    def prepare(self, base: nn.Module, config: MissConfig, path: str) -> None:
        self.r, self.mini_r = config.r, config.mini_r
        self.size_in, self.size_out = features(base)
        self.dropout = config.miss_dropout

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        y: torch.Tensor = inner(x)
        block, shards = self.miss_block, -(-self.size_in // self.r)
        h = F.pad(cast_to(x, block), (0, shards * self.r - self.size_in))
        h = h.reshape(*h.shape[:-1], shards, self.r)
        if self.dropout and self.training:  # of the shards, so that what is filled up draws numbers as well
            h = F.dropout(h, self.dropout)
        out = y + self._all_columns(h.sum(-2) @ block)
        return out if out.dtype is y.dtype else out.to(y.dtype)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        rows = self._all_columns(self.miss_block).T
        return rows.repeat(1, -(-self.size_in // self.r))[:, : self.size_in]

    def _all_columns(self, few: torch.Tensor) -> torch.Tensor:
        """Something with a last dimension of the block's columns, for all outputs: in "mini" the columns take turns."""
        times = self.size_out // few.shape[-1]
        return few if times == 1 else few.repeat(*(1,) * (few.dim() - 1), times)


class MissBat(WeightTransform):
    """MiSS in the form "bat": a block (r, r) for each r outputs, and an update that depends on the weight."""

    numbers = MappingProxyType({"miss_r": "r", "miss_mini_r": "mini_r"})
    miss_block = Held()

    @classmethod
    def slots(cls, base: nn.Module, config: MissConfig, path: str) -> dict[str, Slot]:
        _check_shard(base, config, path)
        size_in, size_out = features(base)
        if size_in % config.r or size_out % config.r:
            raise ValueError(
                f"{path}: the layer has {size_in} inputs and {size_out} outputs, and init_weights='bat' needs both to be "
                f"divisible by `r`, which is {config.r}. Choose another one, or leave the layer out of the targets."
            )
        return {"miss_block": Slot((size_out // config.r, config.r, config.r))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: MissConfig) -> None:
        nn.init.zeros_(tensors["miss_block"])

    def prepare(self, base: nn.Module, config: MissConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.r, self.mini_r = config.r, config.mini_r

    def transformed(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.delta_weight(weight)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        block, r = self.miss_block, self.r
        wide = weight.to(torch.promote_types(weight.dtype, block.dtype))
        # (out / r, in / r, r, r)
        cut = wide.reshape(-1, r, wide.shape[1] // r, r).transpose(1, 2)
        own = block.to(wide.dtype).unsqueeze(1)
        return (cut @ own + own).transpose(1, 2).reshape(wide.shape)


# By what `init_weights` says.
_VARIANTS: Mapping[object, type[AdapterLayer]] = MappingProxyType({"bat": MissBat})


def _variant(config: MissConfig, kind: LayerKind, base: nn.Module | None) -> type[AdapterLayer] | None:
    return _VARIANTS.get(config.init_weights)


def as_miss(
    checkpoint: Checkpoint, config: MissConfig, network: nn.Module, modules: Mapping[str, nn.Module]
) -> Reading | None:
    """A checkpoint of Bone, whose tensors have another name; None where it has none of these."""
    old, new = ".bone_block", ".miss_block"
    if not any(name.endswith(old) for name in checkpoint.names):
        return None
    names = {
        f"{name.removesuffix(old)}{new}" if name.endswith(old) else name: own for name, own in checkpoint.names.items()
    }
    return Reading(checkpoint._replace(names=names), config, ("Bone, as MiSS was called first: read as MiSS",))


METHOD = register(
    Method(
        name=PeftType.MISS,
        summary="Adds to a layer one small trained block that all shards of its inputs share.",
        config=MissConfig,
        prefix="miss_",
        tensor_names=frozenset({"miss_block"}),
        layers=MappingProxyType({LayerKind.LINEAR: MissLayer}),
        variant=_variant,
        layer_views=MappingProxyType({"miss_dropout": dropout_of}),
        default_targets=LORA_TARGETS,
        readings=(as_miss,),
        check=_check,
        names=MappingProxyType({"MissLinear": MissLayer}),
        paper="arXiv 2409.15371",
    )
)
