"""OSF: the smaller singular values of a weight are trained, with their directions kept apart from those of the larger.

Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", arXiv 2504.07097. With
W = U S V of which the k largest values stay: `ΔW = U' S' V' - U'0 S'0 V'0`, of the trained rest and of the rest as it was.
The gradients of U' and V' are projected to be orthogonal to what stays. A checkpoint holds U', S' and V'; the rest is worked
out of the base's weight.
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
from splice.checkpoint.patterns import expression
from splice.checkpoint.types import PeftType
from splice.kinds.casting import cast_to
from splice.kinds.container import Several
from splice.kinds.effect import Effect
from splice.kinds.matching import ALL_LINEAR
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.kinds.worked_out import WorkedOut
from splice.methods.default_targets import OSF_TARGETS
from splice.methods.targeted import Targeted


@dataclass
class OSFConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.OSF

    # k, the number of singular values that stay: a whole number, or a fraction of all of them; None for half.
    effective_rank: int | float | None = None
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`. Those that are not linear are left out.
    target_modules: list[str] | set[str] | str | None = None
    # k of single layers: a regular expression for any part of a path -> its k. The first that matches counts.
    rank_pattern: dict[str, int | float] | None = None
    # Whether the trained values start as the weight's own, so that nothing changes at first; otherwise all are drawn from
    # N(0, 1).
    init_weights: bool | None = True
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # k by names of layers, as other programs write it. No effect, in the reference as here.
    target_svd_config: dict[str, int] | None = None


def _pattern(config: OSFConfig) -> dict[str, int | float]:
    return config.rank_pattern or {}


def _kept(base: nn.Module, config: OSFConfig, path: str) -> int:
    """k, the number of singular values of the layer at `path` that stay.

    Raises:
        ValueError: it is below 1.
    """
    size = min(features(base))
    found = (rank for key, rank in _pattern(config).items() if expression(key, key, "rank_pattern").search(path))
    wanted = next(found, config.effective_rank)
    if wanted is None:
        kept = size // 2
    else:
        kept = int(wanted * size) if isinstance(wanted, float) and 0 < wanted <= 1 else int(wanted)
    kept = max(0, min(kept, size))
    if not kept:
        raise ValueError(
            f"{path}: `effective_rank` should be a positive integer value but the value passed is {kept}: {wanted!r} of "
            f"{size} singular values"
        )
    return kept


def _projected(own: torch.Tensor, basis: torch.Tensor, orthogonal: bool, rows: bool) -> torch.Tensor:
    """`own` itself, whose gradient is projected: onto the span of `basis`, or to be orthogonal to it.

    Args:
        own: (out, m), or (m, in) where the `rows` are the directions.
        basis: orthonormal directions of the same length.
        orthogonal: which of the two.
        rows: whether directions are rows, or columns.
    """
    # In the graph and not as a hook on the parameter: that goes with the object, and copies, casts and FSDP make others.
    # The difference is zero, so the value is exact; the projection is its own transpose, so it is what the gradient meets.
    now = own.detach()
    change, basis = own - now, basis.to(own.dtype)
    inside = (change @ basis.T) @ basis if rows else basis @ (basis.T @ change)
    return now + (change - inside if orthogonal else inside)


class OSFLayer(WorkedOut):
    """OSF on a linear layer."""

    low_u, low_s, low_v = (Held(f"osf_svd_params.{name}") for name in ("U_low", "S_low", "V_low"))
    first_u, first_s, first_v = Held("_osf_U_low_init"), Held("_osf_S_low_init"), Held("_osf_V_low_init")
    numbers = MappingProxyType({"effective_rank": "kept"})

    @classmethod
    def slots(cls, base: nn.Module, config: OSFConfig, path: str) -> dict[str, Slot]:
        size_in, size_out = features(base)
        low = min(size_in, size_out) - _kept(base, config, path)
        shapes = {"S_low": (low,), "U_low": (size_out, low), "V_low": (low, size_in)}
        return {f"osf_svd_params.{name}": Slot(shape) for name, shape in shapes.items()}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: OSFConfig) -> None:
        for name in ("U_low", "S_low", "V_low"):
            tensor = tensors[f"osf_svd_params.{name}"]
            # What they start as is worked out anyway: until then they have no values.
            nn.init.constant_(tensor, math.nan) if config.init_weights else nn.init.normal_(tensor)

    def new_entry(self, container: str) -> nn.Module:
        return Several()

    def prepare(self, base: nn.Module, config: OSFConfig, path: str) -> None:
        self.kept = _kept(base, config, path)
        super().prepare(base, config, path)

    def work_out(self, weight: torch.Tensor) -> None:
        k, own = self.kept, self.low_u
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        # In the precision of the weight, as those of trained checkpoints were.
        u, s, v = (tensor.to(weight.dtype).to(own.dtype) for tensor in (u, s, v))
        for name, value in (("U", u[:, k:]), ("S", s[k:]), ("V", v[k:])):
            self.keep(f"_osf_{name}_low_init", value.contiguous())
            trained = self.tensor(f"osf_svd_params.{name}_low")
            if not (trained.is_meta or weight.is_meta) and trained.isnan().all():
                trained.data.copy_(value)
        size_out, size_in = weight.shape
        if size_out > size_in:
            self.keep("_osf_U_high", u[:, :k].contiguous())
        if size_in > size_out:
            self.keep("_osf_V_high", v[:k].contiguous())

    def trained(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U', S' and V', whose gradients stay away from the directions that are kept."""
        u, s, v = self.low_u, self.low_s, self.low_v
        if torch.is_grad_enabled() and (u.requires_grad or v.requires_grad):
            # Where U or V is square, what is orthogonal to its larger part is the span of its smaller one.
            high_u, high_v = self.find("_osf_U_high"), self.find("_osf_V_high")
            u = _projected(u, self.first_u if high_u is None else high_u, high_u is not None, False)
            v = _projected(v, self.first_v if high_v is None else high_v, high_v is not None, True)
        return u, s, v

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.low_u)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        u, s, v = self.trained()
        left = torch.cat((u * s, -self.first_u * self.first_s), dim=1)
        return F.linear(F.linear(x, torch.cat((v, self.first_v))), left)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        first = (self.first_u * self.first_s) @ self.first_v
        return (self.low_u * self.low_s) @ self.low_v - first

    def conflict(self, other: Effect) -> str:
        return "both are the smaller singular values of the one weight" if isinstance(other, OSFLayer) else ""


def _check(config: OSFConfig) -> None:
    ranks = {
        "effective_rank": config.effective_rank,
        **{f"rank_pattern[{k!r}]": r for k, r in _pattern(config).items()},
    }
    for name, rank in ranks.items():
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, float))):
            raise ValueError(f"`{name}` should be a whole number or a fraction but the value passed is {rank!r}")


def _all_linear(network: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    return ALL_LINEAR


METHOD = register(
    Method(
        name=PeftType.OSF,
        summary="Trains the smaller singular values of a weight, and keeps their directions apart from those of the larger.",
        config=OSFConfig,
        prefix="osf_",
        tensor_names=frozenset({"osf_svd_params"}),
        layers=MappingProxyType({LayerKind.LINEAR: OSFLayer}),
        containers=("osf_svd_params",),
        default_targets=OSF_TARGETS,
        find_targets=_all_linear,
        passes_over=True,
        exclusive=True,
        check=_check,
        paper="arXiv 2504.07097",
    )
)
