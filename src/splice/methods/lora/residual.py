"""LoRA beside a weight that something was taken out of: `y = (W - R) x + s B A x`, with R of low rank.

The base keeps its weight. R is held as two factors that are worked out from that weight and are not saved, and it counts
only while the adapter is selected; the reference writes `W - R` into the base, for good.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import features
from splice.errors import UnsupportedLayerError
from splice.kinds.casting import cast_to
from splice.kinds.effect import Factors, Forward
from splice.kinds.lasting import lasting
from splice.kinds.original import original_weight
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.dora import DoraOnLinear
from splice.methods.lora.inits import Taken, taken
from splice.methods.lora.layers import LowRank, OnLinear, product

_WIDE = (torch.float32, torch.float64)


class Residual(LowRank):
    """What such layers share. It stands before the LoRA layer of the kind.

    `taken_B taken_A` is -R: what is added to the weight.
    """

    reads_weight = True
    taken_A, taken_B = Held("taken_A"), Held("taken_B")

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.init = config.init_lora_weights
        self._take()

    def taken(self, weight: torch.Tensor) -> Taken:
        """R, of the base's own `weight` (out, in)."""
        raise NotImplementedError

    @lasting()
    def _take(self) -> None:
        weight, like = original_weight(self.base), self.a
        if weight.is_meta:
            (size_out, size_in), meta = weight.shape, torch.device("meta")
            found = Taken(torch.empty(self.r, size_in, device=meta), torch.empty(size_out, self.r, device=meta), 1.0)
        else:
            found = self.taken(weight if weight.dtype in _WIDE else weight.float())
        device = weight.device if weight.is_meta else like.device
        self.keep("taken_A", found.a.to(device=device, dtype=like.dtype).contiguous())
        self.keep("taken_B", (-found.scale * found.b).to(device=device, dtype=like.dtype).contiguous())

    def _taken_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        # Left empty where the adapter was made without values; the base has its own by the time of a call.
        if self.taken_A.is_meta and not self.a.is_meta:
            self._take()
        return self.taken_A, self.taken_B

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        # What was taken sees the input as the base does: without dropout.
        return super().around(x, partial(self._without_taken, inner))  # type: ignore[no-any-return]

    def _without_taken(self, inner: Forward, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = inner(x)
        a, b = self._taken_factors()
        out = y + F.linear(F.linear(cast_to(x, a), a), b)
        return out if out.dtype is y.dtype else out.to(y.dtype)

    def plain(self) -> Factors:
        # `s B A - R` as one product of twice the rank.
        found, (taken_a, taken_b) = super().plain(), self._taken_factors()
        if not found.scale:
            return Factors(taken_a, taken_b, 1.0)
        b = torch.cat([found.b, taken_b / found.scale], dim=1)
        return Factors(torch.cat([found.a, taken_a]), b, found.scale)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        a, b = self._taken_factors()
        change = product(b, a)
        plain = super().delta_weight(weight + change)
        return None if plain is None else change + plain


class StartsAtTaken(Residual):
    """What starts at the part of the weight that it took out: PiSSA, OLoRA. It stands before the LoRA layer of the kind."""

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        rank, most = cls.rank(config, path), min(features(base))
        if rank > most:
            raise UnsupportedLayerError(
                f"{path}: init_lora_weights={config.init_lora_weights!r} takes {rank} directions of a weight that has {most}"
            )
        return super().slots(base, config, path)

    def taken(self, weight: torch.Tensor) -> Taken:
        return taken(self.init, weight, self.r, self.initial_scale)

    @torch.no_grad()
    def begin(self) -> None:
        if not self.taken_A.is_meta:
            self.a.copy_(self.taken_A)
            self.b.copy_(self.taken_B / -self.initial_scale)
        super().begin()


class TakenLinear(StartsAtTaken, OnLinear):
    """LoRA that starts at a part of the weight."""


class TakenDoraLinear(StartsAtTaken, DoraOnLinear):
    """The same with DoRA, whose norms are those of what is left of the weight."""

    def base_weight(self, dtype: torch.dtype) -> torch.Tensor:
        a, b = self._taken_factors()
        return super().base_weight(dtype) + (b @ a).to(dtype)
