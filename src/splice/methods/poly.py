"""Poly: a mixture of low-rank skills for each task. Ponti et al., arXiv 2202.13914, section 2; in parts of the layer's
features, each with a mixture of its own: Caccia et al., "Multi-Head Adapter Routing", arXiv 2211.03831, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn
from torch.distributions import RelaxedBernoulli

from splice.base.layers import LayerKind, features
from splice.checkpoint.types import PeftType
from splice.kinds.additive import Additive
from splice.kinds.casting import cast_to
from splice.kinds.effect import Forward
from splice.kinds.registry import Method, register
from splice.kinds.scale import add_scaled
from splice.kinds.slot import Slot
from splice.kinds.tasks import ReadsTasks, check_tasks, tasks_of_call
from splice.kinds.tensors import Held
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted, check_positive

# The one way to mix skills that there is.
_POLY = "poly"
# Beside the sum of a row's weights, which may be zero.
_LEAST = 1e-12


@dataclass
class PolyConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.POLY
    rank_field = "r"

    # Rank of every skill, at least 1.
    r: int = 8
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Whether B starts at zero, so that nothing changes at first; otherwise it is drawn like A.
    init_weights: bool = True
    # How skills are mixed: "poly".
    poly_type: str = _POLY
    # The number of tasks that `task_ids` of a call may name.
    n_tasks: int = 1
    # The number of skills that a task mixes.
    n_skills: int = 4
    # The number of parts that a layer's features are cut into, each with a mixture of its own. It divides the sizes of
    # every target.
    n_splits: int = 1


def _check(config: PolyConfig) -> None:
    check_positive(r=config.r, n_tasks=config.n_tasks, n_skills=config.n_skills, n_splits=config.n_splits)
    if config.poly_type != _POLY:
        raise ValueError(f"Unsupported poly_type: {config.poly_type!r}; there is {_POLY!r} alone.")


class PolyLayer(ReadsTasks, Additive):
    """Poly on a linear layer."""

    mergeable = False
    numbers = MappingProxyType({"r": "r", "n_tasks": "n_tasks", "n_skills": "n_skills", "n_splits": "n_splits"})
    # (splits, skills, in / splits, r), (splits, skills, r, out / splits), and (tasks, splits * skills).
    a, b, logits = Held("poly_lora_A"), Held("poly_lora_B"), Held("poly_router.module_logits")

    @classmethod
    def slots(cls, base: nn.Module, config: PolyConfig, path: str) -> dict[str, Slot]:
        splits, skills, r = config.n_splits, config.n_skills, config.r
        sizes = features(base)
        if any(size % splits for size in sizes):
            raise ValueError(
                f"{path}: `n_splits` ({splits}) must divide the sizes of the layer, {sizes[0]} and {sizes[1]}"
            )
        size_in, size_out = (size // splits for size in sizes)
        return {
            "poly_lora_A": Slot((splits, skills, size_in, r)),
            "poly_lora_B": Slot((splits, skills, r, size_out)),
            "poly_router.module_logits": Slot((config.n_tasks, splits * skills)),
        }

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: PolyConfig) -> None:
        _draw(tensors["poly_lora_A"].mT)
        if config.init_weights:
            nn.init.zeros_(tensors["poly_lora_B"])
        else:
            _draw(tensors["poly_lora_B"].mT)
        nn.init.uniform_(tensors["poly_router.module_logits"], -1e-3, 1e-3)

    def prepare(self, base: nn.Module, config: PolyConfig, path: str) -> None:
        self.r, self.n_tasks, self.n_skills, self.n_splits = config.r, config.n_tasks, config.n_skills, config.n_splits
        self.scale = 1 / config.r

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.a)

    def wrapped_for(self, inner: Forward, rows: torch.Tensor, batch: int) -> Forward:
        return lambda x: self._of_tasks(x, inner, (rows, batch))

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        return self._of_tasks(x, inner, None)

    def _of_tasks(self, x: torch.Tensor, inner: Forward, part: tuple[torch.Tensor, int] | None) -> torch.Tensor:
        """The adapted output for `x`, which may be a `part` of a batch: which rows, and of how many."""
        y: torch.Tensor = inner(x)
        ids = check_tasks(tasks_of_call.heard_by(self), self.n_tasks, "n_tasks").to(self.logits.device)
        if part is not None:
            rows, batch = part
            ids = ids[rows // max(1, batch // len(ids))]
        if x.dim() != 3 or len(x) % len(ids):
            raise ValueError(
                f"Poly takes an input (batch, tokens, features) with as many rows as `task_ids` has, {len(ids)}, got "
                f"{tuple(x.shape)}: which row is of which task cannot be told."
            )
        # Of several sequences for one row each is of its task.
        weights = self.mixture(ids).repeat_interleave(len(x) // len(ids), 0)
        return add_scaled(y, self.update(self.cast_input(x), weights), self.scale).to(y.dtype)

    def mixture(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, splits, skills): how much of each skill rows of these tasks get; drawn anew at every call in training."""
        logits = self.logits[ids].view(-1, self.n_splits, self.n_skills)
        # Its temperature; not checked, as that would ask for every value.
        drawn = (
            RelaxedBernoulli(logits.new_ones(()), logits=logits, validate_args=False).rsample()
            if self.training
            else None
        )
        weights = torch.sigmoid(logits) if drawn is None else drawn
        return weights / (weights.sum(-1, keepdim=True) + _LEAST)

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The unscaled update, (rows, T, out), for `x` (rows, T, in) with these mixtures (rows, splits, skills)."""
        a = torch.einsum("bqs,qsdr->bqdr", weights, self.a)
        b = torch.einsum("bqs,qsrd->bqrd", weights, self.b)
        # A's parts are one above the other, and B's side by side.
        return x @ a.flatten(1, 2) @ b.transpose(1, 2).flatten(2)


@torch.no_grad()
def _draw(matrices: torch.Tensor) -> None:
    """Fill (splits, skills, rows, columns) as linear layers are, one after the other."""
    splits, skills, *shape = matrices.shape
    for skill in range(skills):
        for split in range(splits):
            drawn = nn.init.kaiming_uniform_(torch.empty(shape, dtype=matrices.dtype), a=math.sqrt(5))
            matrices[split, skill].copy_(drawn)


METHOD = register(
    Method(
        name=PeftType.POLY,
        summary="Adds to each layer a mixture of low-rank updates, which every task mixes in its own way.",
        config=PolyConfig,
        prefix="poly_",
        tensor_names=frozenset({"poly_lora_A", "poly_lora_B", "poly_router"}),
        layers=MappingProxyType({LayerKind.LINEAR: PolyLayer}),
        containers=("poly_lora_A", "poly_lora_B", "poly_router"),
        default_targets=LORA_TARGETS,
        check=_check,
        paper="arXiv 2202.13914",
    )
)
