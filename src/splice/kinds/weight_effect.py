"""What an adapter layer needs of the weight of its base layer, and does to its tensors when it is merged into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch


class WeightEffect:
    """The effect on weights. Most methods supply `delta_weight`; the rest follows from it.

    The order of a merge: a trained bias is put in place, then `replaced`, then `deltas` are added.
    Tensors come and go by their names on the base layer, each in the shape of the base's own.
    """

    # Whether it is a change of the layer's tensors at all; it may depend on the layer.
    mergeable: bool = False
    # Whether making a layer looks at the values of its tensors: a load waits for these first. Where it does not, they are
    # read while layers are made.
    reads_values: ClassVar[bool] = True
    # Whether its forward needs the base's dense weight, or it takes something from that when it is made.
    reads_weight: ClassVar[bool] = False
    # Whether a new adapter takes its start from that weight, where one from a checkpoint does without.
    starts_from_weight: ClassVar[bool] = False
    # Whether `deltas` gives and takes `weight` as (out, in), however the base stores it.
    linear_layout: ClassVar[bool] = True
    # Whether the base with the merged tensors computes what the adapter does; where not, merging says what is lost.
    merges_exactly: bool = True
    # What that is, and what to do about it, for messages that begin with the adapter.
    lost_when_merged: ClassVar[str] = (
        "computes something on this layer that no weight does: merged, the output is another one."
    )
    # Other adapters that are merged with it: it has them take effect.
    merged_with: tuple[str, ...] = ()
    # Whether it goes on computing while it is merged: the base's own tensors cannot hold what it is.
    stays_merged: bool = False

    @property
    def changed_names(self) -> tuple[str, ...]:
        """The base tensors that merging changes."""
        return ("weight",) if self.delta_bias() is None else ("weight", "bias")

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What merging adds to each of `changed_names`, given these tensors of the base."""
        found = {"weight": self.delta_weight(tensors["weight"]), "bias": self.delta_bias()}
        return {name: delta for name, delta in found.items() if delta is not None}

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        """What merging adds to the dense `weight`, and in its shape; None where it cannot be merged.

        (out, in) for linear layers, however they store it; (vocabulary, dim), or (out, in / groups, *kernel).
        """
        return None

    def delta_bias(self) -> torch.Tensor | None:
        """What merging adds to the base bias, (out); None for nothing."""
        return None

    def replaced(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What merging puts in the place of these tensors of the base, before anything is added."""
        return {}
