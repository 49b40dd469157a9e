"""What VeRA and PVeRA share: two random, frozen matrices for all layers of an adapter, and two trained vectors for each.

With A (codes, max in) and B (max out, r) cut to the layer's size, a layer trains d (codes) and b (out). A checkpoint holds A
and B, or the seed of the numbers they are made of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import nn

from splice.base.dense import dtype_of
from splice.base.dtypes import HALVES
from splice.base.layers import LayerKind, features, kind_of
from splice.kinds.additive import Additive
from splice.kinds.casting import cast_to
from splice.kinds.layer import Config
from splice.kinds.shared import SharedTensors, UsesShared
from splice.kinds.slot import Role, Slot
from splice.kinds.tensors import Held
from splice.methods.targeted import check_positive


class ProjectedFields(Protocol):
    """The fields that the configs of both have."""

    # Rank r of the shared matrices, at least 1.
    r: int
    # Seed of the random numbers in them, and whether a checkpoint holds them.
    projection_prng_key: int
    save_projection: bool
    # What the elements of d start at, if the vectors start so that nothing changes.
    d_initial: float
    init_weights: bool


def check(config: ProjectedFields) -> None:
    """Raise ValueError for ranks below 1."""
    check_positive(r=config.r)


class Projections(SharedTensors):
    """A and B, as large as the largest of the targets."""

    A: Held
    B: Held
    # Rows of A for each column of B.
    codes: ClassVar[int] = 1

    @classmethod
    def shared_slots(cls, targets: Sequence[tuple[str, nn.Module]], config: ProjectedFields) -> dict[str, Slot]:
        sizes = [features(base) for _, base in targets]
        a = (cls.codes * config.r, max((size_in for size_in, _ in sizes), default=0))
        b = (max((size_out for _, size_out in sizes), default=0), config.r)
        stored = config.save_projection
        return {cls.A.suffix: Slot(a, Role.BUFFER, stored), cls.B.suffix: Slot(b, Role.BUFFER, stored)}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: ProjectedFields) -> None:
        source, own = torch.Generator().manual_seed(config.projection_prng_key), dtype_of(base)
        for tensor in (tensors[cls.A.suffix], tensors[cls.B.suffix]):
            bound = math.sqrt(6 / max(tensor.shape[1], 1))
            tensor.uniform_(-bound, bound, generator=source)
            if own in HALVES:  # rounded to the base's precision, also where they are held in another one
                tensor.copy_(tensor.to(own))


class Projected(UsesShared, Additive):
    """The vectors of a linear layer, stored either way round."""

    b: Held
    d: Held
    # What the adapter's layers share.
    projections: ClassVar[type[Projections]]

    @classmethod
    def slots(cls, base: nn.Module, config: ProjectedFields, path: str) -> dict[str, Slot]:
        codes = cls.projections.codes * config.r
        return {cls.b.suffix: Slot((features(base)[1],)), cls.d.suffix: Slot((codes,))}

    @classmethod
    def resolved(cls, base: nn.Module, config: ProjectedFields) -> dict[str, object]:
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    def prepare(self, base: nn.Module, config: Config, path: str) -> None:
        self.sizes = features(base)
        self.r = config.r

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: ProjectedFields) -> None:
        b, d = tensors[cls.b.suffix], tensors[cls.d.suffix]
        if config.init_weights:
            nn.init.zeros_(b)
            nn.init.constant_(d, config.d_initial)
        else:
            nn.init.ones_(b)
            nn.init.normal_(d)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (codes, in) and B (out, r), on the device of this layer and in its dtype."""
        (shared,) = self.shared
        assert isinstance(shared, Projections)
        size_in, size_out = self.sizes
        own = self.d
        # Cut and moved at every call, not once: a cut that is kept would be a second copy on every layer, and a layer on
        # another device than A and B would go on with what it had when these are loaded anew.
        return shared.A[:, :size_in].to(own), shared.B[:size_out].to(own)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.d)
