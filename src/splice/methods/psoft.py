"""PSOFT: the largest singular directions of a weight are turned into one another by a small trained rotation.

"Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", arXiv 2505.11235. With B A the part of the weight that
its r largest singular values make, and R (r, r) orthogonal but for a scale on each side: `ΔW = B (R - I) A`. A checkpoint
holds what R is made of. A and B are worked out of the base's weight, and R tells their signs apart: so the same
decomposition has to be made again, on the same kind of device.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.dense import dtype_of
from splice.base.layers import LayerKind, features, kind_of
from splice.base.weight_access import is_plain
from splice.checkpoint.types import PeftType
from splice.errors import UnsupportedLayerError, warn
from splice.kinds.as_one import Alike
from splice.kinds.casting import cast_to
from splice.kinds.dropout import dropout_of
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.kinds.worked_out import WorkedOut
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.random_svd import svd_from_seed
from splice.methods.rotations import cayley, series, skew_places
from splice.methods.targeted import Targeted, check_positive


@dataclass
class PsoftConfig(Targeted):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: a field has none of its values.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.PSOFT
    rank_field = "r"
    scale_fields = ("psoft_alpha", "r")

    # The number r of singular directions, at least 1 and at most the smaller side of the weight.
    r: int = 32
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # alpha, the numerator of the scale alpha / r. B is divided by that scale, so it changes nothing; not 0.
    psoft_alpha: int = 32
    # Probability with which each input of A is set to zero in training, 0 to 1.
    psoft_dropout: float = 0.0
    # Whether the base stores weights as (in, out). No effect: PSOFT cannot be put on such layers.
    fan_in_fan_out: bool = False
    # Where the singular values go: into B ("psoft_init"), or their roots into both A and B ("pissa_init").
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    # How the weight is decomposed: exactly ("full"), or its largest directions by a random start ("lowrank").
    psoft_svd: Literal["full", "lowrank"] = "full"
    # The number of iterations of "lowrank".
    psoft_svd_lowrank_niter: int = 10
    # Seed of the random start of "lowrank".
    random_seed: int = 0
    # Whether R is orthogonal, and made of r (r - 1) / 2 values; otherwise all its r^2 values are trained.
    psoft_orth: bool = True
    # Whether what R gives has a trained scale for each direction.
    psoft_mag_b: bool = True
    # Whether what R takes has a trained scale for each direction.
    psoft_mag_a: bool = True
    # Whether R is worked out by a series that is cut off, instead of exactly.
    use_cayley_neumann: bool = False
    # The number of terms of that series. 3 computes what 4 does, as every checkpoint with 3 was trained.
    num_cayley_neumann_terms: int = 5
    # The largest norm that the skew-symmetric matrix goes into the series with, between 0 and 1; None for no limit.
    cayley_neumann_eps: float | None = None
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Whether R starts as the identity, so that nothing changes at first; otherwise something is drawn from N(0, 0.01).
    init_weights: bool = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (
            ("ab_svd_init", self.ab_svd_init, ["pissa_init", "psoft_init"]),
            ("psoft_svd", self.psoft_svd, ["full", "lowrank"]),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {known}; got {value!r}.")
        eps = self.cayley_neumann_eps
        if self.use_cayley_neumann:
            check_positive(num_cayley_neumann_terms=self.num_cayley_neumann_terms)
            if eps is not None and not 0 < eps < 1:
                raise ValueError(f"`cayley_neumann_eps` must be in (0, 1) when set; got {eps}.")
        elif eps is not None:
            warn("`cayley_neumann_eps` is ignored without `use_cayley_neumann`.")
        if self.psoft_svd == "full" and self.psoft_svd_lowrank_niter != 10:
            warn("`psoft_svd_lowrank_niter` is ignored unless `psoft_svd` is 'lowrank'.")

    def computed(self) -> dict[str, object]:
        lowrank = self.psoft_svd == "lowrank"
        return {
            "ab_svd_init": self.ab_svd_init,
            "psoft_svd": self.psoft_svd,
            "psoft_svd_lowrank_niter": self.psoft_svd_lowrank_niter if lowrank else None,
            "random_seed": self.random_seed if lowrank else None,
            "use_cayley_neumann": self.use_cayley_neumann,
            "num_cayley_neumann_terms": self.num_cayley_neumann_terms if self.use_cayley_neumann else None,
            "cayley_neumann_eps": self.cayley_neumann_eps if self.use_cayley_neumann else None,
        }


def _check(config: PsoftConfig) -> None:
    check_positive(r=config.r)
    if not config.psoft_alpha:
        raise ValueError("`psoft_alpha` should not be 0: the singular values are divided by it")


# What the singular values can be read in, and worked with in float32.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class PsoftLayer(Alike, WorkedOut):
    """PSOFT on a linear layer."""

    weight = Held("psoft_R.weight")
    A, B = Held("_psoft_A_cache"), Held("_psoft_B_cache")
    numbers = MappingProxyType({**WorkedOut.numbers, "psoft_alpha": "psoft_alpha"})

    @classmethod
    def slots(cls, base: nn.Module, config: PsoftConfig, path: str) -> dict[str, Slot]:
        sizes, r, own = features(base), config.r, dtype_of(base)
        # Of a weight that was quantised since, the directions may come with other signs: R would mean something else.
        if own not in _DTYPES or not is_plain(base):
            raise UnsupportedLayerError(
                f"{path}: PSOFT requires a weight in float32, float16 or bfloat16, and this one is "
                f"{f'in {own}' if is_plain(base) else 'quantised'}. Load the base in one of these, or leave the layer out."
            )
        if r > min(sizes):
            raise ValueError(
                f"{path}: `r` ({r}) must be at most {min(sizes)}, the smaller of the layer's sizes {sizes}"
            )
        shapes = {"weight": (r * (r - 1) // 2,) if config.psoft_orth else (r, r)}
        shapes |= {"vector_b": (r,)} if config.psoft_mag_b else {}
        shapes |= {"vector_a": (r,)} if config.psoft_mag_a else {}
        return {f"psoft_R.{name}": Slot(shape) for name, shape in shapes.items()}

    @classmethod
    def resolved(cls, base: nn.Module, config: PsoftConfig) -> dict[str, object]:
        return {"fan_in_fan_out": False} if kind_of(base) is LayerKind.LINEAR else {}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: PsoftConfig) -> None:
        for name, tensor in tensors.items():
            if name != "psoft_R.weight":
                nn.init.ones_(tensor)
                continue
            nn.init.zeros_(tensor) if config.init_weights else nn.init.normal_(tensor, std=0.1)
            if not config.psoft_orth:
                tensor += torch.eye(len(tensor))

    def prepare(self, base: nn.Module, config: PsoftConfig, path: str) -> None:
        self.r, self.psoft_alpha, self.dropout = config.r, config.psoft_alpha, config.psoft_dropout
        self.scale = self.initial_scale = config.psoft_alpha / config.r
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.largest = config.cayley_neumann_eps if config.use_cayley_neumann else None
        self.places = skew_places(config.r)
        super().prepare(base, config, path)

    def work_out(self, weight: torch.Tensor) -> None:
        u, s, v = _largest(weight.float(), self.config)
        s = s / (self.psoft_alpha / self.r)
        if self.config.ab_svd_init == "pissa_init":
            root = s.sqrt()
            a, b = root[:, None] * v, u * root
        else:
            a, b = v, u * s
        self.keep("_psoft_A_cache", a.contiguous())
        self.keep("_psoft_B_cache", b.contiguous())

    def likeness(self) -> Hashable:
        return None if isinstance(self.scale, torch.Tensor) else (self.scale, self.terms, self.largest)

    def rotation(self) -> torch.Tensor:
        """R, (r, r), with the scales on both its sides."""
        own = self.weight
        wide = own.to(torch.promote_types(own.dtype, torch.float32))
        found = wide if own.dim() == 2 else self._orthogonal(wide)
        b, a = self.find("psoft_R.vector_b"), self.find("psoft_R.vector_a")
        found = found if b is None else b[:, None] * found
        return found if a is None else found * a

    def _orthogonal(self, own: torch.Tensor) -> torch.Tensor:
        place, sign = self.places
        if place.device != own.device:
            self.places = place, sign = place.to(own.device), sign.to(own.device)
        if not len(own):  # one direction cannot be turned
            return torch.ones_like(sign, dtype=own.dtype)
        q = own.index_select(0, place).view_as(sign) * sign
        if self.terms is None:
            return cayley(-q)  # `(I + Q) (I - Q)^-1`, and so the other way round than OFT's
        if self.largest is not None:
            norm = q.norm()
            q = torch.where(norm > self.largest, q * (self.largest / (norm + 1e-12)), q)
        return series(q, self.terms)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.A)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, self.A)
        return F.linear(F.linear(hidden, self.rotation().to(hidden.dtype)) - hidden, self.B)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        rotation = self.rotation().to(self.A.dtype)
        return self.scale * (self.B @ (rotation @ self.A - self.A))


def _largest(weight: torch.Tensor, config: PsoftConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (out, r), S (r) and V (r, in) of the r largest singular values."""
    if config.psoft_svd == "full":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, : config.r], s[: config.r], v[: config.r]
    return svd_from_seed(weight, config.r, config.psoft_svd_lowrank_niter, config.random_seed)


METHOD = register(
    Method(
        name=PeftType.PSOFT,
        summary="Turns the largest singular directions of a weight into one another, by a small trained rotation.",
        config=PsoftConfig,
        prefix="psoft_",
        tensor_names=frozenset({"psoft_R"}),
        layers=MappingProxyType({LayerKind.LINEAR: PsoftLayer}),
        containers=("psoft_R",),
        layer_views=MappingProxyType(
            {
                "psoft_dropout": dropout_of,
                "psoft_svd": lambda layer: layer.config.psoft_svd,
                "psoft_svd_lowrank_niter": lambda layer: layer.config.psoft_svd_lowrank_niter,
                "random_seed": lambda layer: layer.config.random_seed,
                "ab_svd_init": lambda layer: layer.config.ab_svd_init,
            }
        ),
        default_targets=LORA_TARGETS,
        check=_check,
        paper="arXiv 2505.11235",
    )
)
