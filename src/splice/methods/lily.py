"""Lily: neighbouring layers share the first factor of LoRA, all layers of a kind a bank of second ones, mixed by a router.

Zhong et al., "Low-Rank Interconnected Adaptation across Layers", arXiv 2407.09946, section 3. With A (r, in), a bank B of n
matrices (r, out), a router (n, r), and the mean over all tokens of the batch: `h = A x`, `p = mean(softmax(router h))`,
`y = base(x) + s * h (p_1 B_1 + ... + p_n B_n)`. The update of a token depends on all others of its batch, padding included,
and is no change of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted


@dataclass
class LilyConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.LILY
    rank_field = "r"
    scale_fields = ("scaling",)
    # Beside a regular expression as `target_modules`, `layers_to_transform` is no error here; it has no effect.
    index_needs_names: ClassVar[bool] = False

    # Rank r of the factors, at least 1.
    r: int = 32
    # How many layers of a kind, one after the other, share one A; at least 1.
    stride_A: int = 1
    # n, how many matrices the bank B of a kind of layers has; at least 2.
    num_B: int = 2
    # s, the factor of the update.
    scaling: float = 1.0
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`. Those that one of the ends names, and that have the same sizes, are of one kind.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # Whether B starts at zero, so that nothing changes at first; otherwise all tensors are random.
    init_weights: bool = True

    def computed(self) -> dict[str, object]:
        return {"scaling": self.scaling}


def _check(config: LilyConfig) -> None:
    for name, value, least in (("r", config.r, 1), ("stride_A", config.stride_A, 1), ("num_B", config.num_B, 2)):
        if value < least:
            raise ValueError(f"`{name}` should be an integer of at least {least} but the value passed is {value}")


class LilyLayer(Additive):
    """Lily on a linear layer."""

    mergeable = False
    lily_A, lily_B, lily_router = Held("lily_A.weight"), Held("lily_B.weight"), Held("lily_router.weight")

    @classmethod
    def slots(cls, base: nn.Module, config: LilyConfig, path: str) -> dict[str, Slot]:
        size_in, size_out = features(base)
        return {
            "lily_A.weight": Slot((config.r, size_in)),
            "lily_B.weight": Slot((config.num_B * config.r, size_out)),
            "lily_router.weight": Slot((config.num_B, config.r)),
        }

    def prepare(self, base: nn.Module, config: LilyConfig, path: str) -> None:
        self.r, self.scale = config.r, config.scaling

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LilyConfig) -> None:
        for suffix, tensor in tensors.items():
            if suffix == "lily_B.weight" and config.init_weights:
                nn.init.zeros_(tensor)
            else:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.lily_A)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, self.lily_A)  # (..., r)
        shares = F.linear(h, self.lily_router).softmax(dim=-1).flatten(0, -2).mean(dim=0)  # (n)
        bank = self.lily_B
        # One product for the mean of the bank, which no token has for itself.
        return h @ (shares @ bank.view(len(shares), -1)).view(self.r, -1)


def _groups(targets: Sequence[tuple[str, nn.Module]], config: LilyConfig) -> dict[str, dict[str, str]]:
    """B is the first layer's of each kind, A that of the first of `stride_A` layers of a kind; each has its router."""
    names = () if isinstance(config.target_modules, str) else tuple(config.target_modules or ())
    kinds: dict[object, list[str]] = {}
    found: dict[str, dict[str, str]] = {}
    for path, base in targets:
        # Ends as plain strings: the reference takes no dot into account here. Where several fit a layer it takes any; all of
        # them together make a kind that whatever it took holds.
        ends = frozenset(name for name in names if path.endswith(name))
        alike = kinds.setdefault((ends, features(base)), [])
        alike.append(path)
        leaders = {
            "lily_A.weight": alike[(len(alike) - 1) // config.stride_A * config.stride_A],
            "lily_B.weight": alike[0],
        }
        found[path] = {suffix: leader for suffix, leader in leaders.items() if leader != path}
    return found


METHOD = register(
    Method(
        name=PeftType.LILY,
        summary="Adds to each layer a product of two factors: one shared with its neighbours, one mixed from a shared bank.",
        config=LilyConfig,
        prefix="lily_",
        tensor_names=frozenset({"lily_A", "lily_B", "lily_router"}),
        layers=MappingProxyType({LayerKind.LINEAR: LilyLayer}),
        groups=_groups,
        layer_views=MappingProxyType(
            {"stride_A": lambda layer: layer.config.stride_A, "num_B": lambda layer: layer.config.num_B}
        ),
        default_targets=LORA_TARGETS,
        check=_check,
        paper="arXiv 2407.09946",
    )
)
