"""SHiRA: some entries of each weight are trained, at places that are drawn at random or chosen by a mask.

Bhardwaj et al., "Sparse High Rank Adapters", arXiv 2406.13175, section 3. With S (out, in) zero but for r (in + out) trained
entries: `y = base(x) + s * S x`. A checkpoint holds the entries and their places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from splice.base.layers import LayerKind, features
from splice.checkpoint.types import PeftType
from splice.errors import warn
from splice.kinds.registry import Method, register
from splice.kinds.slot import Role, Slot
from splice.kinds.sparse import Entries, SparseUpdate
from splice.kinds.tensors import Held
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.shira.mask_functions import random_mask
from splice.methods.targeted import Targeted, check_positive


@dataclass
class ShiraConfig(Targeted):
    """Fields and defaults of the reference, in its order.

    `mask_fn`, which is no field and stands in no file, chooses the entries of a new adapter. It is called with a base layer
    and r, and gives a mask (out, in) with r (in + out) ones; with the seed as well where `mask_type` is "random".
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.SHIRA

    # r (in + out) entries of each weight are trained: as many as LoRA of rank r has numbers. At least 1.
    r: int = 32
    # How the entries of a new adapter are chosen: "random", or any other name for a function that is set as `mask_fn`.
    mask_type: str = "random"
    # Seed of the random choice, the same one for each layer; None for a fixed one.
    random_seed: int | None = None
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides, and sets this field.
    fan_in_fan_out: bool = False
    # Whether the entries start at zero, so that nothing changes at first; otherwise they are drawn from N(0, 1).
    init_weights: bool = True
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mask_fn: Callable[..., torch.Tensor] | None = random_mask if self.mask_type == "random" else None
        if self.mask_fn is None and not self.inference_mode:
            warn(
                f"Argument self.mask_type={self.mask_type!r} is not recognized, please supply your own masking function by "
                "calling `config.mask_fn = my_mask_fn`."
            )


def _check(config: ShiraConfig) -> None:
    check_positive(r=config.r)


def _chosen(base: nn.Module, config: ShiraConfig, count: int) -> torch.Tensor:
    """(2, n): rows and columns of the entries that the config's function chooses, one row of the weight after the other.

    Raises:
        ValueError: it has no function, or that gives no mask for so many entries.
    """
    if config.mask_fn is None:
        raise ValueError(
            f"`mask_type` is {config.mask_type!r}, for which there is no function that chooses the entries of a new adapter: "
            "set one with `config.mask_fn = my_mask_fn`, or let it be 'random'."
        )
    options = {"random_seed": config.random_seed} if config.mask_type == "random" else {}
    mask = config.mask_fn(base, config.r, **options)
    size_in, size_out = features(base)
    places = (mask == 1).nonzero()
    if tuple(mask.shape) != (size_out, size_in) or len(places) != count:
        raise ValueError(
            f"`mask_fn` gave a mask of shape {tuple(mask.shape)} with {len(places)} ones for a layer with {size_in} inputs "
            f"and {size_out} outputs: it needs the shape {(size_out, size_in)}, and with r = {config.r} {count} ones."
        )
    return places.T


class ShiraLayer(SparseUpdate):
    """SHiRA on a linear layer."""

    shira_weight, shira_indices = Held(), Held()

    @classmethod
    def slots(cls, base: nn.Module, config: ShiraConfig, path: str) -> dict[str, Slot]:
        size_in, size_out = features(base)
        count = config.r * (size_in + size_out)
        if count > size_in * size_out:
            raise ValueError(
                f"{path}: r = {config.r} asks for {count} entries, and the weight has {size_out} x {size_in} = "
                f"{size_out * size_in}. Lower it, or leave the layer out of the targets."
            )
        places = Slot((2, count), Role.BUFFER, dtype=torch.int32, hidden=True, choices=(size_out, size_in))
        return {"shira_weight": Slot((count,)), "shira_indices": places}

    @classmethod
    def resolved(cls, base: nn.Module, config: ShiraConfig) -> dict[str, object]:
        return {"fan_in_fan_out": False}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: ShiraConfig) -> None:
        values, places = tensors["shira_weight"], tensors["shira_indices"]
        if config.mask_fn is None and config.inference_mode:  # as nothing trains it, it is made to be loaded
            nn.init.zeros_(values)
            places.zero_()
            return
        (nn.init.zeros_ if config.init_weights else nn.init.normal_)(values)
        places.copy_(_chosen(base, config, len(values)))

    def prepare(self, base: nn.Module, config: ShiraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.r = config.r
        self.scale = self.initial_scale = 1.0

    def changes(self) -> Entries:
        rows, columns = self.shira_indices
        return Entries(self.shira_weight, rows, columns)


METHOD = register(
    Method(
        name=PeftType.SHIRA,
        summary="Trains some entries of each weight, chosen at random or by a mask of your own; the update has high rank.",
        config=ShiraConfig,
        prefix="shira_",
        tensor_names=frozenset({"shira_weight", "shira_indices"}),
        layers=MappingProxyType({LayerKind.LINEAR: ShiraLayer}),
        containers=("shira_weight",),
        default_targets=MappingProxyType({**LORA_TARGETS, "phi": ["q_proj", "v_proj"]}),
        check=_check,
        paper="arXiv 2406.13175",
    )
)
