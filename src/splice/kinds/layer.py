"""An adapter layer: what one adapter puts on one target. Tensors, names, file form and effects are small parts of it.

A method supplies `slots` (which tensors, of which shape), `prepare` (numbers that follow from the config), `initialise` and
its mathematics. Everything else (attaching, selecting, merging, dtypes, devices, dropout, saving) is hosted once.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn

from splice.base.weight_access import check_readable, check_showable
from splice.config import PeftConfig
from splice.kinds.effect import Effect
from splice.kinds.file_form import FileForm
from splice.kinds.names import BIAS
from splice.kinds.slot import Leader, Slot
from splice.kinds.tensors import Home as Home
from splice.kinds.tensors import OwnTensors
from splice.kinds.tensors import Registered as Registered
from splice.kinds.weight_effect import WeightEffect

# The config of the method that an adapter layer belongs to: each method names its own class in its place. Which one goes
# with which layer is what a record says when the program runs, so here no type can. A type parameter on every layer, and
# on everything that speaks of layers, would end in this `Any` as well, where the record is looked up by a string.
Config: TypeAlias = Any


class AdapterLayer(OwnTensors, Effect, WeightEffect):
    """Tensors and mathematics of one adapter on one target.

    A class of them is abstract or final: nothing derives from one that a method puts on layers.

    Args:
        base: the target.
        config: the adapter's config.
        path: dotted path of the target in the base model.
        slots: what `slots(base, config, path)` gives.
        tensors: one tensor for every slot, of its shape, made for this layer alone.
    """

    # The target.
    base: nn.Module
    # What of its tensors a checkpoint holds.
    file_form: ClassVar[FileForm] = FileForm()
    # Numbers that scripts read and set on an adapted layer, by the reference's names -> the attribute of this layer.
    numbers: ClassVar[Mapping[str, str]] = MappingProxyType({"scaling": "scale", "r": "r"})
    # The adapter layer that holds tensors which all layers of its adapter use, in a tuple; empty where it uses none.
    shared: tuple[AdapterLayer, ...] = ()
    # Suffix -> whose tensor stands there, of those that it shares with another layer of its adapter.
    leaders: Mapping[str, Leader] = MappingProxyType({})
    # The config that it was made from.
    config: Config
    # The same, where that is not the adapter's.
    own_config: PeftConfig | None = None

    def __init__(
        self,
        base: nn.Module,
        config: PeftConfig,
        path: str,
        slots: Mapping[str, Slot],
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        if self.reads_weight:
            check_readable(base, path, "the adapter")
        self.base, self.config = base, config
        super().__init__(slots, tensors)
        if BIAS in self.registered:
            self.shows = True
        self.prepare(base, config, path)
        if self.shows:
            check_showable(base, path, (*self.changed_names, *(("bias",) if self.trained_bias is not None else ())))

    # -- what a method supplies. Classmethods are asked before there is a layer: a plan needs shapes and nothing more.

    @classmethod
    def slots(cls, base: nn.Module, config: Config, path: str) -> dict[str, Slot]:
        """Every tensor that this adapter has on `base`, by suffix; nothing is allocated.

        Raises:
            ValueError: the config cannot be applied to this layer.
        """
        raise NotImplementedError

    @classmethod
    def new_slots(cls, base: nn.Module, config: Config, path: str) -> dict[str, Slot]:
        """`slots` of a new adapter, of layers whose dimensions a checkpoint tells: here all are known.

        Raises:
            ValueError: the config cannot be applied to this layer.
        """
        return cls.slots(base, config, path)

    @classmethod
    def companions(cls, base: nn.Module, path: str) -> dict[str, type[AdapterLayer]]:
        """Further layers, by path below `base`, that get an adapter layer of their own wherever `base` gets this one."""
        return {}

    @classmethod
    def resolved(cls, base: nn.Module, config: Config) -> dict[str, object]:
        """Fields that the config leaves open and this base decides."""
        return {}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: Config) -> None:
        """Fill the `tensors` of a new adapter in place, by suffix; those that a checkpoint holds, of their slots' shapes.

        They are on the CPU, and in float32 unless they are copies, wherever the layer is: one seed, one adapter.
        """
        raise NotImplementedError

    def prepare(self, base: nn.Module, config: Config, path: str) -> None:
        """Work out what does not change between calls."""

    def begin(self) -> None:
        """Bring a new adapter's tensors where they start, if that takes more than `initialise` knows of."""

    # -- what is the same for all

    @property
    def training(self) -> bool:
        """Whether the layer is being trained."""
        return self.base.training

    @property
    def trained_bias(self) -> torch.Tensor | None:
        """The bias that the adapter trains in the place of the base's own, (out)."""
        return self.find(BIAS)

    def join(self, shared: AdapterLayer) -> None:
        """Be told of what all layers of this adapter have in common, once for each: shared tensors, a network layer.

        Of tensors before any layer is attached, of a network layer when all are about to be.
        """

    def shown(self, base: nn.Module) -> dict[str, torch.Tensor]:
        bias = self.trained_bias
        return {} if bias is None else {"bias": bias}
