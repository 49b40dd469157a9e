"""The class swap: a base layer takes on a generated subclass of its own class, and carries a host.

The object, its parameters and their names stay what they are; `isinstance(layer, nn.Linear)` stays true. Wrapping the layer
in another module instead would rename every parameter below it, and hide the layer from whoever looks for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from splice.base.bare import HOST, NetworkOf
from splice.base.foreign_models import forward_places
from splice.kinds.host import Host
from splice.kinds.layer import AdapterLayer
from splice.kinds.tensors import Home
from splice.selection import Selection
from splice.surgery.adapted_layer import Adapted
from splice.surgery.generated import generated
from splice.surgery.layer_attributes import publish
from splice.surgery.reading import publish_tensors
from splice.surgery.registering import register, share
from splice.surgery.weight_readers import guard_reader, readers_above


def attach(
    layer: nn.Module,
    path: str,
    name: str,
    adapter: AdapterLayer,
    selection: Selection,
    readers: Mapping[str, nn.Module],
    home: Home | None = None,
    network: nn.Module | None = None,
) -> Host:
    """Put `adapter` on `layer` under `name`. Nothing here can fail once the plan has been checked.

    Args:
        layer: the base layer.
        path: its path in the base model.
        name: the adapter's name.
        adapter: its layer, finished.
        selection: of the model.
        readers: modules of the network with a fused path around the layers below them, by path.
        home: where the tensors stand in the tree; on the layer itself, if None.
        network: that the layer is in; None if it is not known.
    """
    if not isinstance(layer, Adapted):
        _swap(layer, path, selection, readers)
        layer.__dict__[HOST].network = NetworkOf(network)
    assert isinstance(layer, Adapted)
    host = layer.splice_host
    host.layers[name] = adapter
    register(adapter, name, home or Home(layer._modules, host.added, layer), host)
    share(adapter, name, host)
    if adapter.shows:
        host.showing.add(name)
        host.shows = True
    host.row_plan = None
    publish(type(layer), adapter)
    return host


def _swap(layer: nn.Module, path: str, selection: Selection, readers: Mapping[str, nn.Module]) -> None:
    original = type(layer)
    cls = generated(Adapted, original)
    publish_tensors(cls, layer, original)
    host = Host(layer, path, original, selection, readers=readers_above(readers, path))
    layer.__dict__[HOST] = host
    # The class before the forward: an interrupt between them leaves a forward that `detach` knows for the layer's own.
    object.__setattr__(layer, "__class__", cls)  # torch's own would look for the name in three registries first
    # Hooks of accelerate and of diffusers keep what they found: the adapters go between the hook, which brings inputs and
    # weights to their device or dtype, and the base. Any other patch has become the base's forward, and the adapters go
    # around it.
    for place in forward_places(layer)[:1]:
        host.own_forward = place.forward
        place.put(cls.forward.__get__(layer))
    for parent in host.readers:
        guard_reader(parent, path)
