"""One adapter layer to be, the unit that a plan is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from splice.config import PeftConfig
from splice.kinds.layer import AdapterLayer


@dataclass(frozen=True)
class Placement:
    """One adapter layer to be: on which base layer, of which class, with which tensors.

    Attributes:
        path: dotted path of the base layer.
        base: the base layer.
        layer_class: the adapter layer to be built.
        slots: suffix -> shape of every tensor it needs.
        stored: whether a checkpoint holds them; others are made again from what the config says.
        own_config: the config of this layer, where it is not the adapter's.
        leader: the path of the layer of the same adapter whose tensors it shares; empty for all but followers.
    """

    path: str
    base: nn.Module
    layer_class: type[AdapterLayer]
    slots: Mapping[str, tuple[int, ...]]
    stored: bool = True
    own_config: PeftConfig | None = None
    leader: str = ""

    @classmethod
    def of(
        cls, path: str, base: nn.Module, layer_class: type[AdapterLayer], config: Any, own: PeftConfig | None = None
    ) -> Placement:
        """With the slots that the config asks for; `own` takes the place of `config` where it is given."""
        return cls(path, base, layer_class, layer_class.slots(base, own or config, path), own_config=own)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Suffix -> name in the checkpoint."""
        return {suffix: self.layer_class.key(self.path, suffix) for suffix in self.slots}

    def key(self, suffix: str) -> str:
        return self.keys[suffix]

    def dtype(self, suffix: str, autocast: bool) -> torch.dtype:
        """The dtype of a tensor in memory; with `autocast` half-precision adapters are held in float32."""
        return self.layer_class.held_dtype(self.base, suffix, autocast)


@dataclass(frozen=True)
class Built:
    """An adapter layer that is finished and not yet attached."""

    placement: Placement
    layer: AdapterLayer
