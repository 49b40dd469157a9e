"""The host: the data that an adapted layer carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from splice.base.backends.backend import Stored
from splice.base.bare import HOST, NetworkOf
from splice.base.offload import Shelf
from splice.kinds.effect import Forward
from splice.kinds.layer import AdapterLayer
from splice.kinds.row_plan import RowPlan
from splice.kinds.stack import Stack
from splice.selection import LayerSelection, Selection


@dataclass(eq=False, repr=False)
class Host:
    """What an adapted layer carries, beside what it was. It is data: whoever swaps, merges or calls does the rest."""

    # The layer itself.
    base: nn.Module
    # Where it is in the base model, dotted; "" is the network itself.
    path: str
    # The class that the layer had before it was adapted.
    original: type[nn.Module]
    # Its share in the selection: that of the model, or its own where the layer alone was told something.
    selection: Selection | LayerSelection
    # Its adapter layers by adapter name, in the order they came.
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    # Modules that adapters put below the layer, by their names there; all others are the base's.
    added: dict[str, nn.Module] = field(default_factory=dict)
    # Names of parameters that adapters put on the layer itself, beside the base's own.
    held: set[str] = field(default_factory=set)
    # The base's own parameters, by name, in whose places in the tree an adapter has put trained ones; shown while that
    # adapter is not selected.
    displaced: dict[str, nn.Parameter] = field(default_factory=dict)
    # The adapter that did so; empty for none.
    displaced_by: str = ""
    # Containers that the layer has in common with others -> the adapters here that use them.
    sharing: dict[str, set[str]] = field(default_factory=dict)
    # The adapters whose layers show tensors in place of the base's.
    showing: set[str] = field(default_factory=set)
    # Whether there are such: every call asks.
    shows: bool = False
    # Whether somebody hooked a module that holds tensors of adapters here: then these are called.
    hooked: bool = False
    # Whether a call has come by since it was adapted, or somebody has read what the adapters make of its tensors.
    reached: bool = False
    # Whether a call has read a tensor of it that cannot be given as the adapters make it.
    read: bool = False
    # Whether inputs of another dtype are cast to that of the adapters.
    casts_input: bool = True
    # Adapters that are in its weights now, in the order they were merged.
    merged: list[str] = field(default_factory=list)
    # Of tensors that are kept elsewhere between calls: where, and what was there before the first merge.
    shelved: dict[str, tuple[Shelf, object]] = field(default_factory=dict)
    # The base's tensors as they were before the first merge, by name; empty while nothing is merged. The parameter itself
    # where another one stands in its place, else the values that it had.
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    # How the base stored its weight before the first merge, where that is no plain tensor; None of all others, and while
    # nothing is merged.
    stored: Stored | None = None
    # The network that it is in.
    network: NetworkOf = field(default_factory=lambda: NetworkOf(None))
    # A forward that stood on the object itself (accelerate's hooks, patches): it goes on being the base's. None for none.
    own_forward: Forward | None = None
    # Parents with a fused path around the layer, which is switched off while it is adapted.
    readers: list[nn.Module] = field(default_factory=list)

    # Where factors of adapters lie side by side; None where none do.
    stack: Stack | None = None
    # How the rows of the last mixed batch were computed; None where there was none since an adapter came or went.
    row_plan: RowPlan | None = None

    @property
    def place(self) -> str:
        """Where the layer is, for messages."""
        return self.path or "the network itself"

    @property
    def shows_displaced(self) -> bool:
        """Whether a call begins with the base's own parameters in the place of those that displaced them."""
        return bool(self.displaced) and self.displaced_by not in self.merged


def host_of(layer: nn.Module) -> Host | None:
    """The host of an adapted layer; None of any other."""
    found: Host | None = layer.__dict__.get(HOST)
    return found


def in_order(layers: Mapping[str, AdapterLayer], names: Sequence[str]) -> list[str]:
    """Those of the active adapters that are on a layer, the innermost first."""
    present = [name for name in names if name in layers]
    flags = {layers[name].first_outside for name in present}
    if len(flags) > 1:  # of several methods: as they were added
        return sorted(present, key=list(layers).index)
    return present[::-1] if True in flags else present


def first_conflict(layers: Mapping[str, AdapterLayer], names: Sequence[str]) -> tuple[str, str, str] | None:
    """Two of these adapters that cannot take effect together on a layer, and why; None if all can."""
    present = [name for name in dict.fromkeys(names) if name in layers]
    for index, two in enumerate(present):
        for one in present[:index]:
            why = layers[two].conflict(layers[one])
            if why:
                return one, two, why
    return None


def name_of(layer: AdapterLayer) -> str:
    """The name of the adapter that an attached layer is of."""
    host = host_of(layer.base)
    assert host is not None
    return next(name for name, own in host.layers.items() if own is layer)
