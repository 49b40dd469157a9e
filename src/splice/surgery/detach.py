"""Taking an adapter layer off; with the last one a layer becomes exactly what it was."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from types import MethodType
from typing import TypeVar, cast

from torch import nn

from splice.base.bare import HOST
from splice.base.foreign_models import forward_places
from splice.kinds.host import Host, host_of
from splice.kinds.layer import AdapterLayer
from splice.kinds.shared import SharedTensors
from splice.surgery.generated import Generated, was_generated
from splice.surgery.registering import unregister, unshare
from splice.surgery.replaced_forward import ReplacedForward
from splice.surgery.weight_readers import release_reader

M = TypeVar("M", bound=nn.Module)


def detach(layer: nn.Module, name: str, stays: bool = False, for_good: bool = True) -> None:
    """Take the adapter off; with its last adapter the layer becomes exactly what it was.

    Also of a layer whose `attach` was interrupted at any point.

    Args:
        layer: the base layer.
        name: the adapter's.
        stays: whether the layer stays adapted without adapters: somebody may be calling it.
        for_good: whether the adapter layer is not attached again, so that hooks need not keep its values.
    """
    host = host_of(layer)
    if host is None:
        return
    # In the order opposite to `attach`, each step only if it was taken: an interrupt may have come between any two.
    dropped = host.layers.get(name)
    if dropped is not None:
        unregister(dropped, name, host, for_good)
        del host.layers[name]
        host.row_plan = None  # it would keep the layer
        if dropped.shared:
            unshare(dropped, name, host)
        if host.shows:
            host.showing.discard(name)
            host.shows = bool(host.showing)
    if not host.layers and not stays:
        _swap_back(layer, host)


def detach_all(
    network: nn.Module,
    layers: Mapping[str, AdapterLayer],
    adapted: MutableMapping[str, M],
    name: str,
    stays: bool,
    for_good: bool,
) -> None:
    """Take an adapter off all of its layers.

    Args:
        network: that the layers are in.
        layers: the adapter's, by path.
        adapted: the adapted layers, by path; those that carry no adapter any more are taken out.
        name: the adapter's.
        stays: as of `detach`.
        for_good: as of `detach`.
    """
    for path, layer in layers.items():
        if isinstance(layer, SharedTensors):
            continue
        # An interrupt may have left a layer attached that is not listed yet.
        base = adapted[path] if path in adapted else network.get_submodule(path)
        detach(base, name, stays, for_good)
        if HOST not in base.__dict__:
            adapted.pop(path, None)
    for layer in layers.values():
        if isinstance(layer, SharedTensors):  # the layers read them
            unregister(layer, name, for_good=for_good)


def _without_adapters(adapted: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """The class that is left; `original`, unless FSDP or the like has put another in front since."""
    if was_generated(adapted) or not issubclass(adapted, Generated):
        return original
    below = tuple(
        _without_adapters(cast("type[nn.Module]", base), original) if issubclass(base, Generated) else base
        for base in adapted.__bases__
    )
    # No class that could be put on a layer has a `__dict__` or `__weakref__` of its own in there: its layout would differ.
    return cast("type[nn.Module]", type(adapted.__name__.replace("Adapted", "", 1), below, dict(adapted.__dict__)))


def _swap_back(layer: nn.Module, host: Host) -> None:
    for parent in host.readers:
        release_reader(parent, host.path)
    adapted, cls = type(layer), _without_adapters(type(layer), host.original)
    layer.__class__ = cls
    # A hook may have come or gone in the meantime; wherever our forward was left, the base's own takes its place.
    for place in forward_places(layer):
        standing = place.forward
        if isinstance(standing, MethodType) and standing.__func__ is adapted.forward:
            place.put(host.own_forward or cls.forward.__get__(layer))
        elif isinstance(standing, ReplacedForward):
            place.put(standing.__wrapped__)
    del layer.__dict__[HOST]
