"""One adapter layer to be, the unit that a plan is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import nn

from splice.base.dense import dtype_of
from splice.base.dtypes import HALVES
from splice.base.sharding import is_tensor_parallel
from splice.config import PeftConfig
from splice.errors import UnsupportedLayerError
from splice.kinds.layer import AdapterLayer
from splice.kinds.layout import LaidOut, Layout
from splice.kinds.slot import Leader, Slot


@dataclass(frozen=True)
class Placement:
    """One adapter layer to be: on which base layer, of which class, with which tensors.

    Attributes:
        path: dotted path of the base layer.
        base: the base layer.
        layer_class: the adapter layer to be built.
        slots: every tensor it needs, by suffix.
        own_config: the config of this layer, where it is not the adapter's.
        leaders: suffix -> whose tensor stands there, of those that it shares with another layer of the same adapter.
        layout: all targets of the adapter, where the adapter layer asks for them; None of all others.
        in_file: what a checkpoint holds of it, by suffix, where that is in another form than its slots; None of all others.
    """

    path: str
    base: nn.Module
    layer_class: type[AdapterLayer]
    slots: Mapping[str, Slot]
    own_config: PeftConfig | None = None
    leaders: Mapping[str, Leader] = field(default_factory=dict)
    layout: Layout | None = None
    in_file: Mapping[str, Slot] | None = None

    @classmethod
    def of(
        cls,
        path: str,
        base: nn.Module,
        layer_class: type[AdapterLayer],
        config: PeftConfig,
        own: PeftConfig | None = None,
        layout: Layout | None = None,
        new: bool = False,
    ) -> Placement:
        """With the slots that the config asks for; `own` takes the place of `config` where it is given.

        With `new` the adapter is made and not loaded.

        Raises:
            UnsupportedLayerError: (a ValueError) each process has a part of the base layer alone, and this adapter layer
                cannot compute with parts.
        """
        if is_tensor_parallel(base) and not layer_class.divides:
            raise UnsupportedLayerError(
                f"{path}: tensor parallelism divides its tensors among processes, and this adapter cannot be put on a part "
                "of a layer. Few can. Leave the layer out of the targets, or load the base without a `tp_plan`."
            )
        if layout is not None:
            slots = cast(type[LaidOut], layer_class).slots_in(layout, base, config, path)
            return cls(path, base, layer_class, slots, layout=layout)
        slots_of, form = layer_class.new_slots if new else layer_class.slots, layer_class.file_form
        slots = slots_of(base, own or config, path)
        return cls(path, base, layer_class, slots, own, in_file=form.slots(slots, config) if form.converts else None)

    @property
    def stored(self) -> Mapping[str, Slot]:
        """What a checkpoint holds of it and loads read, by suffix; those among them that are not stored are not read."""
        return self.slots if self.in_file is None else self.in_file

    def initialise(self, tensors: dict[str, torch.Tensor], config: PeftConfig) -> None:
        """Fill the `tensors` of a new adapter in place, by suffix; `config` is the adapter's."""
        if self.layout is None:
            self.layer_class.initialise(tensors, self.base, self.own_config or config)
        else:
            cast(type[LaidOut], self.layer_class).initialise_in(self.layout, self.path, tensors, self.base, config)

    @property
    def is_product(self) -> bool:
        """Whether its tensors are the factors of a plain product; those of many adapters may be read together."""
        names = self.layer_class.stacked_names
        return bool(names) and self.slots.keys() == set(names)

    @property
    def leader(self) -> str:
        """The path of the layer all of whose tensors it shares; empty for all but followers."""
        if not self.leaders or len(self.leaders) < len(self.slots):
            return ""
        return next(iter(self.leaders.values())).path

    @cached_property
    def keys(self) -> dict[str, str]:
        """Suffix -> name in the checkpoint."""
        # Kept: planning, checking and reading ask for the same names.
        key = self.layer_class.names.key
        return {suffix: key(self.path, suffix) for suffix in self.stored}

    def key(self, suffix: str) -> str:
        """The name of a tensor in the checkpoint."""
        return self.keys[suffix]

    def dtype(self, suffix: str, autocast: bool) -> torch.dtype:
        """The dtype of a tensor in memory; with `autocast` half-precision adapters are held in float32."""
        given = self.slots[suffix].dtype
        if given is not None:
            return given
        own = dtype_of(self.base)
        # Of one byte in any case: nothing can be added or trained in float8.
        return torch.float32 if own in HALVES and (autocast or own.itemsize == 1) else own


class Built(NamedTuple):
    """An adapter layer that is finished and not yet attached."""

    # What it was built from.
    placement: Placement
    # The layer, with all its tensors.
    layer: AdapterLayer
