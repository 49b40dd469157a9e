"""Tensors that all layers of one adapter use: random projections, banks of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from splice.kinds.layer import AdapterLayer, Config
from splice.kinds.names import Names, SharedNames
from splice.kinds.slot import Slot

# Where it stands among an adapter's layers, whose keys are paths: no module can be called so.
SHARED_PATH = "<shared>"


class UsesShared(AdapterLayer):
    """An adapter layer that computes with tensors which all layers of its adapter share. It stands before the kind."""

    def join(self, shared: AdapterLayer) -> None:
        self.shared = (shared,)


class SharedTensors(AdapterLayer):
    """Held once for the adapter, and saved under names of their own.

    It stands on no layer: the layers of its adapter get it by `join`, and the tuner registers it. What is not stored
    `initialise` makes again, bit for bit, from what the config says.
    """

    names: Names = SharedNames()
    # Suffixes of those that a checkpoint holds once more behind the path of each layer.
    written_on_layers: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def shared_slots(cls, targets: Sequence[tuple[str, nn.Module]], config: Config) -> dict[str, Slot]:
        """Every tensor, by suffix, for these targets (path, base layer)."""
        raise NotImplementedError
