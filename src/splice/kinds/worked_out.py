"""The kind that adds an update, part of which is worked out of the base's own weight when the adapter is put on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from splice.kinds.additive import Additive
from splice.kinds.effect import Forward
from splice.kinds.lasting import lasting
from splice.kinds.layer import Config
from splice.kinds.original import original_weight


class WorkedOut(Additive):
    """An additive update with tensors that no checkpoint holds: the base's weight tells them, as long as it is the same.

    They are worked out once, and of the weight without adapters: what is merged just then plays no part.
    """

    reads_weight = True
    # Whether there were no values yet to work them out of (the meta device), so that the first call does.
    waits: bool = False

    def work_out(self, weight: torch.Tensor) -> None:
        """Keep what follows from the base's own dense `weight`; it may be on the meta device, for the shapes alone."""
        raise NotImplementedError

    def prepare(self, base: nn.Module, config: Config, path: str) -> None:
        self.work_out_now()

    def is_outdated(self) -> bool:
        """Whether they have to be worked out before they are used; asked at every call."""
        return self.waits

    @lasting()
    def work_out_now(self) -> None:
        """Work them out of what is there now."""
        weight = original_weight(self.base)
        self.waits = weight.is_meta
        self.work_out(weight)

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        if self.is_outdated():
            self.work_out_now()
        return super().around(x, inner)

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.is_outdated():
            self.work_out_now()
        return super().deltas(tensors)
