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

from splice.base.bare import bare_children, original_class
from splice.kinds.host import Host
from splice.kinds.layer import AdapterLayer
from splice.selection import NOTHING


class NamedView(nn.Module):
    """One attribute of every adapter layer of a layer that has it, by adapter name: `layer.lora_A`.

    It is a module, so that dotted names (`lora_A.default.weight`) lead through it to the tensor itself.
    """

    def __init__(self, host: Host, attribute: str) -> None:
        super().__init__()
        self.__dict__.update(_host=host, _attribute=attribute)

    def _found(self) -> dict[str, Any]:
        return {
            name: attribute_of(layer, self._attribute)
            for name, layer in self._host.layers.items()
            if has_attribute(layer, self._attribute)
        }

    def __getitem__(self, name: str) -> Any:
        return self._found()[name]

    def __getattr__(self, name: str) -> Any:
        found = self.__dict__["_host"].layers.get(name)
        if found is None:
            raise AttributeError(f"no adapter {name!r} has {self.__dict__['_attribute']!r} here")
        return attribute_of(found, self.__dict__["_attribute"])

    def __contains__(self, name: object) -> bool:
        return name in self._found()

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def keys(self) -> list[str]:
        return list(self._found())

    def values(self) -> list[Any]:
        return list(self._found().values())

    def items(self) -> list[tuple[str, Any]]:
        return list(self._found().items())


def has_attribute(layer: AdapterLayer, name: str) -> bool:
    """Whether the adapter layer has a tensor, a holder of tensors or a number of this name."""
    own = layer.aliases.get(name, name)
    return own in layer._parameters or own in layer._modules or own in layer.__dict__


def attribute_of(layer: AdapterLayer, name: str) -> Any:
    """What the adapter layer has under this name of the reference's."""
    return getattr(layer, layer.aliases.get(name, name))


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


def view_of(attribute: str) -> View:
    """The view `layer.<attribute>[<adapter name>]`; an AttributeError where no adapter has it."""

    def read(layer: Any) -> NamedView:
        host = layer.splice_host
        if not any(has_attribute(adapter, attribute) for adapter in host.layers.values()):
            raise AttributeError(f"{type(layer).__name__!r} object has no attribute {attribute!r}")
        return NamedView(host, attribute)

    return View(read)


def publish(cls: type, adapter: AdapterLayer) -> None:
    """Give the adapted class `cls` a view for every tensor of this kind of adapter layer."""
    for name in (*adapter._parameters, *adapter._modules, *adapter.aliases):
        if name != "trained_bias" and name not in cls.__dict__:
            view = view_of(name)
            view.name = name
            setattr(cls, name, view)


class NumbersView(MutableMapping[str, Any]):
    """One number of every adapter layer of a layer that has it: `layer.scaling["default"]`, also to set it."""

    def __init__(self, host: Host, attribute: str) -> None:
        self._attribute = attribute
        self._layers = {n: layer for n, layer in host.layers.items() if has_attribute(layer, attribute)}

    def __getitem__(self, name: str) -> Any:
        return getattr(self._layers[name], self._attribute)

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


def _numbers(attribute: str) -> View:
    return View(lambda layer: NumbersView(layer.splice_host, attribute))


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

    adapters = View(lambda layer: layer.splice_adapters)
    scaling = _numbers("scale")
    r = _numbers("r")
    lora_alpha = _numbers("lora_alpha")
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
        state = {name: value for name, value in layer.__dict__.items() if name != "splice_host"}
        state["_modules"] = dict(bare_children(layer))
        if "forward" in state:  # a hook stands on the object, and goes on being called
            state["forward"] = partial(_without_adapters, layer)
        bare.__dict__.update(state)
        return bare

    @method_view
    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of one adapter to `scale` times what its config says; an unknown name is ignored."""
        layer = self.splice_host.layers.get(adapter)
        if layer is not None and has_attribute(layer, "initial_scale"):
            layer.scale = scale * layer.initial_scale  # type: ignore[assignment,operator]

    @method_view
    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for layer in _active_scaled(self):
            layer.scale = layer.scale * scale

    @method_view
    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters by `scale`, or set it back to what their configs say."""
        for layer in _active_scaled(self):
            layer.scale = layer.initial_scale if scale is None else layer.scale / scale


def _active_scaled(layer: Any) -> list[Any]:
    layers = layer.splice_host.layers
    active = [layers[name] for name in _active(layer) if name in layers]
    return [adapter for adapter in active if has_attribute(adapter, "initial_scale")]
