"""What scripts and other libraries read on an adapted layer, in the reference's words.

`layer.lora_A["default"].weight`, `layer.scaling["default"]`, `layer.base_layer` and their like are views: they hold
nothing, so they can never disagree with the adapter layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from types import FunctionType
from typing import Protocol

from torch import nn

from splice.base.bare import HOST, bare_children
from splice.kinds.additive import Additive
from splice.kinds.host import Host
from splice.kinds.layer import AdapterLayer
from splice.selection import NOTHING


class Adapts(Protocol):
    """An adapted layer, as far as this file knows it."""

    splice_host: Host


class View:
    """A read-only attribute that gives way to anything of the same name on the object or on its own class."""

    # Not a property: that would hide what the base layer itself has under the name, a submodule `adapters` for one.

    def __init__(self, read: Callable[[Host], object]) -> None:
        self.read = read
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Adapts | None, owner: type) -> object:
        if layer is None:
            return self
        host = layer.splice_host
        for tensors in (host.base._parameters, host.base._buffers, host.base._modules):
            if self.name in tensors:
                return tensors[self.name]
        for cls in host.original.__mro__:
            if self.name in cls.__dict__:
                own: object = cls.__dict__[self.name]
                return own.__get__(layer, owner) if isinstance(own, (FunctionType, property)) else own
        return self.read(host)


def method_view(function: Callable[..., object]) -> View:
    """A method that gives way like a `View`."""
    view = View(lambda host: partial(function, host.base))
    view.__doc__ = function.__doc__
    return view


def publish(cls: type, adapter: AdapterLayer) -> None:
    """Give the adapted class `cls` a view for every number of this kind of adapter layer."""
    # On the class, when the first such adapter comes. `__getattr__` would be asked for each name that the layer lacks.
    for name, attribute in adapter.numbers.items():
        if name not in cls.__dict__:
            view = View(partial(NumbersView, attribute))
            view.name = name
            setattr(cls, name, view)


class NumbersView(MutableMapping[str, object]):
    """One number of every adapter layer of a layer that has it: `layer.scaling["default"]`, also to set it."""

    def __init__(self, attribute: str, host: Host) -> None:
        self._attribute = attribute
        # Those that have worked the number out. A class may declare it for kinds of layers that have none.
        self._layers = {name: adapter for name, adapter in host.layers.items() if attribute in vars(adapter)}

    def __getitem__(self, name: str) -> object:
        return vars(self._layers[name])[self._attribute]

    def __setitem__(self, name: str, value: object) -> None:
        setattr(self._layers[name], self._attribute, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{self._attribute} of adapter {name!r} goes with the adapter: use `delete_adapter`")

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return repr(dict(self))


def _without_adapters(host: Host, *args: object, **kwargs: object) -> object:
    with host.selection.for_this_call(NOTHING):
        return host.base.forward(*args, **kwargs)


def _active(host: Host) -> list[str]:
    return list(host.selection.active)


def _active_one(host: Host) -> str | list[str]:
    names = _active(host)
    return names[0] if len(names) == 1 else names


def bare_layer(host: Host) -> nn.Module:
    """The layer without adapters: the same tensors, seen through the class that the layer had."""
    # An object of its own, made anew each time: one that was kept would not see parameters exchanged since.
    cls = host.original
    bare = cls.__new__(cls)
    state = {name: value for name, value in vars(host.base).items() if name != HOST}
    state["_modules"] = dict(bare_children(host.base))
    if "forward" in state:  # a hook stands on the object, and goes on being called
        state["forward"] = partial(_without_adapters, host)
    vars(bare).update(state)
    return bare


class AdaptedViews:
    """The attributes and methods that the reference's layers have, on an adapted layer."""

    splice_host: Host

    adapters = View(lambda host: host.layers)
    merged_adapters = View(lambda host: list(host.merged))
    merged = View(lambda host: bool(host.merged))
    active_adapters = View(_active)
    active_adapter = View(_active_one)
    disable_adapters = View(lambda host: not host.selection.enabled)
    cast_input_dtype_enabled = View(lambda host: host.casts_input)
    base_layer = View(bare_layer)
    original_module = View(bare_layer)

    @method_view
    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of one adapter to `scale` times what its config says; an unknown name is ignored."""
        layer = self.splice_host.layers.get(adapter)
        if isinstance(layer, Additive) and layer.initial_scale is not None:
            layer.rescale(scale * layer.initial_scale)

    @method_view
    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for layer in _active_scaled(self.splice_host):
            layer.rescale(layer.scale * scale)

    @method_view
    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters by `scale`, or set it back to what their configs say."""
        for layer in _active_scaled(self.splice_host):
            layer.rescale((layer.initial_scale or 1.0) if scale is None else layer.scale / scale)


def _active_scaled(host: Host) -> list[Additive]:
    active = [host.layers[name] for name in host.selection.active if name in host.layers]
    return [adapter for adapter in active if isinstance(adapter, Additive) and adapter.initial_scale is not None]
