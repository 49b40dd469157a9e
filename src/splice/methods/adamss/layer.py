"""AdaMSS on a linear layer.

"AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning", openreview 8ZdWmpYxT0. With N (R, in + 1) the
largest right singular directions of the weight and bias, and the rows of the weight in groups: the outputs of group i get
`B_i A_i N [x, 1]`. A checkpoint holds N, and not which row is in which group: that is worked out of the base again.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import features
from splice.base.offload import at_hand
from splice.base.weight_access import check_readable
from splice.errors import AdapterMismatchError, UnsupportedFeatureError
from splice.kinds.casting import cast_to
from splice.kinds.container import Several
from splice.kinds.original import original_tensor, original_weight
from splice.kinds.slot import ANY, Role, Slot
from splice.kinds.tensors import Held
from splice.kinds.worked_out import WorkedOut
from splice.methods.adamss.config import AdamssConfig
from splice.methods.adamss.groups import Groups, split


def _groups(base: nn.Module, config: AdamssConfig) -> Groups:
    return split(original_weight(base), original_tensor(base, "bias"), config)


class AdamssLayer(WorkedOut):
    """A low-rank update for each group of rows of the weight, in the weight's own directions."""

    newB = Held("adamss_newB")
    numbers = MappingProxyType({"num_subspaces": "count"})
    # The rows of each group; empty while the base has no values.
    rows: tuple[torch.Tensor, ...] = ()
    # Of each tensor, by its suffix, while it is trained: the running mean of its importance, and of how that varies.
    importance: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def slots(cls, base: nn.Module, config: AdamssConfig, path: str) -> dict[str, Slot]:
        size_in, size_out = features(base)
        columns = size_in + (original_tensor(base, "bias") is not None)
        directions, count = min(config.r, size_out, columns), min(config.num_subspaces, size_out)
        # How many rows are in a group, and of which rank its update is, a checkpoint tells.
        a = {f"adamss_A.{number}": Slot((ANY, directions)) for number in range(count)}
        b = {f"adamss_B.{number}": Slot((ANY, ANY)) for number in range(count)}
        return {**a, **b, "adamss_newB": Slot((directions, columns), Role.BUFFER)}

    @classmethod
    def new_slots(cls, base: nn.Module, config: AdamssConfig, path: str) -> dict[str, Slot]:
        check_readable(base, path, "the adapter")
        with at_hand([base]):
            return cls._new_slots(base, config, path)

    @classmethod
    def _new_slots(cls, base: nn.Module, config: AdamssConfig, path: str) -> dict[str, Slot]:
        if original_weight(base).is_meta:
            raise UnsupportedFeatureError(
                f"{path}: a new AdaMSS adapter is made for the values of the weight, and it is on the meta device. Load the "
                "base's weights first."
            )
        found, slots = _groups(base, config), cls.slots(base, config, path)
        for number, rows in enumerate(found.rows):
            rank = found.rank(number, config)
            slots[f"adamss_A.{number}"] = Slot((rank, found.left.shape[1]))
            slots[f"adamss_B.{number}"] = Slot((len(rows), rank))
        return slots

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: AdamssConfig) -> None:
        found = _groups(base, config)
        tensors["adamss_newB"].copy_(found.directions)
        for number, rows in enumerate(found.rows):
            a, b = tensors[f"adamss_A.{number}"], tensors[f"adamss_B.{number}"]
            # The directions in which the rows of the group differ most.
            a.copy_(torch.linalg.svd(found.left[rows], full_matrices=False).Vh[: len(a)])
            nn.init.zeros_(b) if config.init_weights else nn.init.normal_(b, std=0.01)

    def new_entry(self, container: str) -> nn.Module:
        return Several()

    def prepare(self, base: nn.Module, config: AdamssConfig, path: str) -> None:
        self.path, self.count = path, min(config.num_subspaces, features(base)[1])
        self.size_in = features(base)[0]
        self.has_bias = self.newB.shape[1] > self.size_in
        self.importance = {}
        super().prepare(base, config, path)

    def work_out(self, weight: torch.Tensor) -> None:
        if weight.is_meta:
            return
        self.rows = _groups(self.base, self.config).rows
        found, sizes = [len(rows) for rows in self.rows], [len(self.b(number)) for number in range(self.count)]
        if found != sizes:
            raise AdapterMismatchError(
                f"{self.path}: the adapter was trained for groups of {sizes} rows, and those of this weight have {found}: it "
                "is another base than the one it was trained on, or one in another precision. Load the base as it was."
            )
        # Row -> its place among the rows of all groups.
        self.places = torch.cat(self.rows).argsort()

    def a(self, number: int) -> torch.Tensor:
        return self.tensor(f"adamss_A.{number}")

    def b(self, number: int) -> torch.Tensor:
        return self.tensor(f"adamss_B.{number}")

    def down(self) -> torch.Tensor:
        """All A, (ranks of all groups, R)."""
        return torch.cat([self.a(number) for number in range(self.count)])

    def up(self) -> torch.Tensor:
        """All B in their rows of the output, (out, ranks of all groups)."""
        parts = [self.b(number) for number in range(self.count)]
        together: torch.Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
        if self.places.device != together.device:
            self.places = self.places.to(together.device)
        return together[self.places]

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.newB)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        own = self.newB
        seen = F.linear(x, own[:, : self.size_in], own[:, -1] if self.has_bias else None)
        return F.linear(F.linear(seen, self.down()), self.up())

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return self.up() @ (self.down() @ self.newB[:, : self.size_in])

    def delta_bias(self) -> torch.Tensor | None:
        return self.up() @ (self.down() @ self.newB[:, -1]) if self.has_bias else None

    @property
    def changed_names(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.has_bias else ("weight",)
