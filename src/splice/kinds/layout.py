"""The layout: all targets of one adapter, in order, for methods whose tensors on a target depend on the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from splice.kinds.layer import AdapterLayer, Config
from splice.kinds.slot import Slot


# Equal to itself alone: what a method works out of a layout it may keep for as long as that one lives.
@dataclass(frozen=True, eq=False)
class Layout:
    """All targets of one adapter, in the order of the model."""

    # Path -> base layer.
    targets: Mapping[str, nn.Module]
    # The network that they are in; None where somebody asks about one target alone.
    network: nn.Module | None = None

    @cached_property
    def positions(self) -> dict[str, int]:
        """Path -> how many targets come before it."""
        return {path: position for position, path in enumerate(self.targets)}


class LaidOut(AdapterLayer):
    """The part of an adapter layer, or of what all layers share, that asks for the layout.

    Of its functions a method supplies those that it needs, in the place of the ones that are given no layout.
    """

    @classmethod
    def slots(cls, base: nn.Module, config: Config, path: str) -> dict[str, Slot]:
        # Of a target without others, where somebody asks whether tensors could be those of a layer.
        return cls.slots_in(Layout({path: base}), base, config, path)

    @classmethod
    def slots_in(cls, layout: Layout, base: nn.Module, config: Config, path: str) -> dict[str, Slot]:
        """`slots`, of one of the targets of `layout`.

        Raises:
            ValueError: the config cannot be applied to this layer.
        """
        raise NotImplementedError

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: Config) -> None:
        raise TypeError(f"{cls.__name__} cannot be initialised without the layout: `initialise_in` is")

    @classmethod
    def initialise_in(
        cls, layout: Layout, path: str, tensors: dict[str, torch.Tensor], base: nn.Module, config: Config
    ) -> None:
        """`initialise`, of one of the targets of `layout`, or of what they share."""
        raise NotImplementedError

    def prepare_in(self, layout: Layout, path: str) -> None:
        """Work out what follows from the layout; called once, after `prepare`."""
