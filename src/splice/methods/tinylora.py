"""TinyLoRA: an update within the largest singular vectors of a weight, steered by a few trained numbers.

Morris et al., "Learning to Reason in 13 Parameters", arXiv 2602.04118, section 4. With A (r, in) and B (out, r) from the
singular value decomposition of the weight, fixed random P (u, r, r), and v (u), which neighbouring layers may share:
`R = v_1 P_1 + ... + v_u P_u`, `y = base(x) + B R A x`. A checkpoint holds A and B; it holds P, or the seed that it was drawn
from: that of a layer is the config's and the layer's position among all targets.
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

from splice.base.dense import device_of, dtype_of, in_linear_layout
from splice.base.dtypes import HALVES
from splice.base.foreign_models import embed_scale
from splice.base.layers import LayerKind, kind_of
from splice.base.weight_access import dense_weight, weight_shape
from splice.checkpoint.types import PeftType
from splice.kinds.additive import Additive
from splice.kinds.casting import cast_to, check_values
from splice.kinds.container import Holder, Several
from splice.kinds.dropout import dropout_of
from splice.kinds.layout import LaidOut, Layout
from splice.kinds.registry import Method, register
from splice.kinds.shared import SHARED_PATH, SharedTensors
from splice.kinds.slot import Role, Slot
from splice.kinds.tensors import Held
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted, check_positive


@dataclass
class TinyLoraConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.TINYLORA
    rank_field = "r"
    # Beside a regular expression as `target_modules`, `layers_to_transform` is no error here; it has no effect.
    index_needs_names: ClassVar[bool] = False

    # Rank r of A and B, at least 1; no layer has more than its smaller side.
    r: int = 2
    # u, how many numbers a vector v has, at least 1.
    u: int = 64
    # The share of layers that have no v of their own: 0 for one each, 1 for one in all.
    weight_tying: float = 0.0
    # Seed of P; each layer adds its position.
    projection_seed: int = 42
    # Whether a checkpoint holds P; otherwise each load draws it again from the seed.
    save_projection: bool = True
    # With `init_weights="uniform"` v starts with numbers between this one and its negative.
    init_v_bound: float = 0.02
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Probability with which each input of A is set to zero in training, 0 to 1; on embeddings each number of B.
    tinylora_dropout: float = 0.0
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides, and sets this field.
    fan_in_fan_out: bool = False
    # Biases of the base to train with the adapter: "none", "all", or "tinylora_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # How v starts: True for zeros, so that nothing changes at first; "uniform" and False within `init_v_bound`.
    init_weights: bool | str = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(r=self.r, u=self.u)
        if not 0 <= self.weight_tying <= 1:
            raise ValueError(f"`weight_tying` should be between 0 and 1 but the value passed is {self.weight_tying}")

    def computed(self) -> dict[str, object]:
        # A projection that a file holds is read from it.
        return {"projection_seed": None if self.save_projection else self.projection_seed}


def group_count(targets: int, tying: float) -> int:
    """How many vectors an adapter has."""
    return max(1, round(targets * (1 - tying)))


def group_of(position: int, targets: int, tying: float) -> int:
    """Which of them a layer has; the last one's layers are those that are left."""
    count = group_count(targets, tying)
    return min(position // max(1, targets // count), count - 1)


class TinyLoraVectors(SharedTensors):
    """The trained vectors, one for each group of layers."""

    @classmethod
    def shared_slots(cls, targets: Sequence[tuple[str, nn.Module]], config: TinyLoraConfig) -> dict[str, Slot]:
        return {f"tinylora_v.{n}": Slot((config.u,)) for n in range(group_count(len(targets), config.weight_tying))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: TinyLoraConfig) -> None:
        bound = config.init_v_bound
        for vector in tensors.values():
            nn.init.zeros_(vector) if config.init_weights is True else nn.init.uniform_(vector, -bound, bound)

    def new_entry(self, container: str) -> nn.Module:
        return Several()


class TinyLora(LaidOut, Additive):
    """What TinyLoRA on every kind of layer shares."""

    starts_from_weight = True
    tinylora_A, tinylora_B, tinylora_P = Held(), Held(), Held()
    numbers = MappingProxyType({"r": "r", "u": "u"})

    @classmethod
    def slots_in(cls, layout: Layout, base: nn.Module, config: TinyLoraConfig, path: str) -> dict[str, Slot]:
        rows, columns = weight_shape(base)
        r = min(config.r, rows, columns)
        slots = {
            "tinylora_A": Slot((r, columns), Role.BUFFER),
            "tinylora_B": Slot((rows, r), Role.BUFFER),
            **({"tinylora_P": Slot((config.u, r, r), Role.BUFFER)} if config.save_projection else {}),
        }
        # Every layer names the vectors of all, as in the reference.
        count = group_count(len(layout.targets), config.weight_tying)
        slots.update({f"tinylora_v.{number}": Slot((config.u,), stored=False) for number in range(count)})
        return slots

    @classmethod
    def resolved(cls, base: nn.Module, config: TinyLoraConfig) -> dict[str, object]:
        kind = kind_of(base)
        return {} if kind is LayerKind.EMBEDDING else {"fan_in_fan_out": kind is LayerKind.TRANSPOSED_LINEAR}

    @classmethod
    def initialise_in(
        cls, layout: Layout, path: str, tensors: dict[str, torch.Tensor], base: nn.Module, config: TinyLoraConfig
    ) -> None:
        weight = in_linear_layout(base, dense_weight(base)).float().cpu()
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        r, root = len(tensors["tinylora_A"]), s.sqrt()
        tensors["tinylora_A"].copy_(_rounded(root[:r, None] * vt[:r], base))
        tensors["tinylora_B"].copy_(_rounded(u[:, :r] * root[:r], base))
        if "tinylora_P" in tensors:
            tensors["tinylora_P"].copy_(_projection(layout, path, config, r, base))

    def prepare(self, base: nn.Module, config: TinyLoraConfig, path: str) -> None:
        self.r, self.u, self.dropout = config.r, config.u, config.tinylora_dropout

    def prepare_in(self, layout: Layout, path: str) -> None:
        config = self.config
        number = group_of(layout.positions[path], len(layout.targets), config.weight_tying)
        self.vector_name = f"tinylora_v.{number}"
        if not config.save_projection:
            a = self.tinylora_A
            projection = _projection(layout, path, config, len(a), self.base)
            self.keep("tinylora_P", projection.to(device=device_of(self.base), dtype=a.dtype))

    def new_entry(self, container: str) -> nn.Module:
        return Several() if container == "tinylora_v" else Holder()

    def core(self) -> torch.Tensor:
        """R (r, r)."""
        p = self.tinylora_P
        mixed: torch.Tensor = torch.tensordot(self.tensor(self.vector_name).to(p), p, 1)
        return mixed

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return self.tinylora_B @ self.core() @ self.tinylora_A


class TinyLoraLayer(TinyLora):
    """TinyLoRA on a linear layer, stored either way round."""

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.tinylora_A)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(F.linear(x, self.tinylora_A), self.core()), self.tinylora_B)


class TinyLoraEmbedding(TinyLora):
    """TinyLoRA on an embedding. Of one that multiplies what it looks up (Gemma), the update is not multiplied."""

    def prepare(self, base: nn.Module, config: TinyLoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.merges_exactly = embed_scale(base) is None

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        # Looked up here, as it is these numbers that dropout is for.
        b = self.tinylora_B
        check_values(b, x)
        return F.embedding(x, b)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.core() @ self.tinylora_A


def _projection(layout: Layout, path: str, config: TinyLoraConfig, r: int, base: nn.Module) -> torch.Tensor:
    """P (u, r, r), by the position of a layer among the adapter's own targets."""
    # Not by that among those of the first adapter of the model, which the reference takes for all that come later.
    source = torch.Generator().manual_seed(config.projection_seed + layout.positions[path])
    return _rounded(torch.empty(config.u, r, r).normal_(0, 1 / math.sqrt(r), generator=source), base)


def _rounded(tensor: torch.Tensor, base: nn.Module) -> torch.Tensor:
    """`tensor` rounded to the precision of `base`, also where it is held in another one."""
    own = dtype_of(base)
    return tensor.to(own).to(tensor.dtype) if own in HALVES else tensor


def _groups(targets: Sequence[tuple[str, nn.Module]], config: TinyLoraConfig) -> dict[str, dict[str, str]]:
    shared = dict.fromkeys(TinyLoraVectors.shared_slots(targets, config), SHARED_PATH)
    return {path: shared for path, _ in targets}


METHOD = register(
    Method(
        name=PeftType.TINYLORA,
        summary="Adds to a weight a mix of its largest singular vectors, steered by a few numbers that layers may share.",
        config=TinyLoraConfig,
        prefix="tinylora_",
        tensor_names=frozenset({"tinylora_v", "tinylora_A", "tinylora_B", "tinylora_P"}),
        layers=MappingProxyType(
            {
                LayerKind.LINEAR: TinyLoraLayer,
                LayerKind.TRANSPOSED_LINEAR: TinyLoraLayer,
                LayerKind.EMBEDDING: TinyLoraEmbedding,
            }
        ),
        shared=TinyLoraVectors,
        groups=_groups,
        layer_views=MappingProxyType({"tinylora_dropout": dropout_of}),
        default_targets=LORA_TARGETS,
        paper="arXiv 2602.04118",
    )
)
