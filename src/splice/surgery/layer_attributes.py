"""What scripts and other libraries read on an adapted layer, in the reference's words.

`layer.lora_A["default"].weight`, `layer.scaling["default"]`, `layer.base_layer` and their like are views: they hold
nothing, so they can never disagree with the adapter layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from types import FunctionType
from typing import Any, cast

from torch import nn

from splice.base.bare import HOST, bare_children, original_class
from splice.kinds.additive import Additive
from splice.kinds.layer import AdapterLayer
from splice.selection import NOTHING


class View:
    """A read-only attribute that gives way to anything of the same name on the object or on its own class."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type) -> Any:
        if layer is None:
            return self
        for tensors in (layer._parameters, layer._buffers, layer._modules):
            if self.name in tensors:
                return tensors[self.name]
        for cls in original_class(layer).__mro__:
            if self.name in cls.__dict__:
                own = cls.__dict__[self.name]
                return own.__get__(layer, owner) if isinstance(own, (FunctionType, property)) else own
        return self.read(layer)


def method_view(function: Callable[..., Any]) -> Any:
    """A method that gives way like a `View`."""
    view = View(lambda layer: partial(function, layer))
    view.__doc__ = function.__doc__
    return view


def publish(cls: type, adapter: AdapterLayer) -> None:
    """Give the adapted class `cls` a view for every number of this kind of adapter layer."""
    for name, attribute in adapter.numbers.items():
        if name not in cls.__dict__:
            view = View(partial(NumbersView, attribute))
            view.name = name
            setattr(cls, name, view)


class NumbersView(MutableMapping[str, Any]):
    """One number of every adapter layer of a layer that has it: `layer.scaling["default"]`, also to set it."""

    def __init__(self, attribute: str, layer: Any) -> None:
        layers = layer.splice_host.layers.items()
        self._attribute = attribute
        self._layers = {name: adapter for name, adapter in layers if attribute in adapter.__dict__}

    def __getitem__(self, name: str) -> Any:
        return self._layers[name].__dict__[self._attribute]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._layers[name], self._attribute, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{self._attribute} of adapter {name!r} goes with the adapter: use `delete_adapter`")

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return repr(dict(self))


def _without_adapters(layer: Any, *args: Any, **kwargs: Any) -> Any:
    with layer.splice_host.selection.for_this_call(NOTHING):
        return layer.forward(*args, **kwargs)


def _active(layer: Any) -> list[str]:
    return list(layer.splice_host.selection.active)


def _active_one(layer: Any) -> str | list[str]:
    names = _active(layer)
    return names[0] if len(names) == 1 else names


class AdaptedViews:
    """The attributes and methods that the reference's layers have, on an adapted layer."""

    splice_host: Any

    adapters = View(lambda layer: layer.splice_host.layers)
    merged_adapters = View(lambda layer: list(layer.splice_host.merged))
    merged = View(lambda layer: bool(layer.splice_host.merged))
    active_adapters = View(_active)
    active_adapter = View(_active_one)
    disable_adapters = View(lambda layer: not layer.splice_host.selection.enabled)
    base_layer = View(lambda layer: layer.get_base_layer())
    original_module = View(lambda layer: layer.get_base_layer())

    @method_view
    def get_base_layer(self) -> nn.Module:
        """The layer without adapters: the same tensors, seen through the class that the layer had."""
        layer = cast(nn.Module, self)
        cls = original_class(layer)
        bare = cls.__new__(cls)
        state = {name: value for name, value in layer.__dict__.items() if name != HOST}
        state["_modules"] = dict(bare_children(layer))
        if "forward" in state:  # a hook stands on the object, and goes on being called
            state["forward"] = partial(_without_adapters, layer)
        bare.__dict__.update(state)
        return bare

    @method_view
    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of one adapter to `scale` times what its config says; an unknown name is ignored."""
        layer = self.splice_host.layers.get(adapter)
        if isinstance(layer, Additive) and layer.initial_scale is not None:
            layer.scale = scale * layer.initial_scale

    @method_view
    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for layer in _active_scaled(self):
            layer.scale = layer.scale * scale

    @method_view
    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters by `scale`, or set it back to what their configs say."""
        for layer in _active_scaled(self):
            layer.scale = (layer.initial_scale or 1.0) if scale is None else layer.scale / scale


def _active_scaled(layer: Any) -> list[Additive]:
    layers = layer.splice_host.layers
    active = [layers[name] for name in _active(layer) if name in layers]
    return [adapter for adapter in active if isinstance(adapter, Additive) and adapter.initial_scale is not None]
