"""The class swap: a base layer takes on a generated subclass of its own class, and carries a host."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from splice.base.bare import HOST
from splice.base.layers import ADAPTERS
from splice.kinds.host import AdapterDict, Host
from splice.kinds.layer import AdapterLayer
from splice.selection import Selection
from splice.surgery.adapted import Adapted
from splice.surgery.generated import generated
from splice.surgery.layer_attributes import publish
from splice.surgery.weight_readers import below_guard, guard_reader, readers_above, with_guard_of


def attach(
    layer: nn.Module,
    path: str,
    name: str,
    adapter: AdapterLayer,
    selection: Selection,
    readers: Mapping[str, nn.Module],
) -> Host:
    """Put `adapter` on `layer` under `name`. Nothing here can fail once the plan has been checked."""
    if not isinstance(layer, Adapted):
        _swap(layer, path, selection, readers)
    assert isinstance(layer, Adapted)
    layer.splice_adapters.put(name, adapter)
    layer.splice_host.shows |= adapter.shows
    publish(below_guard(type(layer)), adapter)
    return layer.splice_host


def _swap(layer: nn.Module, path: str, selection: Selection, readers: Mapping[str, nn.Module]) -> None:
    adapters = AdapterDict()
    adapters.training = layer.training
    original = below_guard(type(layer))
    cls = generated(Adapted, original)
    host = Host(layer, path, original, selection, adapters._modules, readers=readers_above(readers, path))
    layer.__dict__[HOST] = host
    layer._modules[ADAPTERS] = adapters
    # accelerate's hooks call `_old_forward`, other patches are called by the object: both sit below the adapters.
    name = next((name for name in ("_old_forward", "forward") if name in layer.__dict__), None)
    if name is not None:
        host.own_forward = layer.__dict__[name]
        layer.__dict__[name] = cls.forward.__get__(layer)
    layer.__class__ = with_guard_of(layer, cls)  # type: ignore[assignment]
    for parent in host.readers:
        guard_reader(parent, path)
