"""The kind that acts on the call of the network as a whole, and not on its layers."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import nn

from splice.kinds.adapters import Adapters, layers_of
from splice.kinds.effect import Forward
from splice.kinds.layer import AdapterLayer, Config
from splice.kinds.module_copy import SavedModule, WholeModule


class NetworkLayer(AdapterLayer):
    """What one adapter puts on the call of the network, or of the part of it that takes what the adapter brings."""

    # The adapter layer for modules that such an adapter saves whole.
    head: ClassVar[type[WholeModule]] = SavedModule
    # Whether its tensors stand on what holds the network, and not on the PeftModel around that.
    on_tuner: ClassVar[bool] = False
    # Whether positions that the caller gives are worked out anew.
    drops_positions: ClassVar[bool] = False

    @classmethod
    def place(cls, network: nn.Module, config: Config) -> str:
        """Path of the module whose call it acts on.

        Raises:
            ValueError: the network has none.
        """
        raise NotImplementedError

    @classmethod
    def for_training(cls, config: Config) -> type[NetworkLayer]:
        """The class of an adapter in training, where it has other tensors than are needed to use it.

        Where a checkpoint lacks them, as those of the reference do, what it holds is trained.
        """
        return cls

    @classmethod
    def generate_of(cls, adapters: Adapters) -> Forward:
        """`generate` of the network, for encoder-decoders: these call their encoder without calling the network."""
        return cast("Forward", adapters.model.generate)


def network_layers(adapters: Adapters) -> dict[str, NetworkLayer]:
    """Adapter name -> what it puts on the call of the network, for all adapters that do."""
    each = {name: layers_of(adapters, [name], NetworkLayer) for name in adapters.placed}
    return {name: layer for name, found in each.items() for layer in found.values()}
