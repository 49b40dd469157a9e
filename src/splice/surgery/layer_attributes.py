"""What scripts and other libraries read on an adapted layer, in the reference's words.

`layer.lora_A["default"].weight`, `layer.scaling["default"]`, `layer.base_layer` and their like are views: they hold
nothing, so they can never disagree with the adapter layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from types import FunctionType
from typing import Protocol

import torch
from torch import nn

from splice.base.bare import HOST, bare_children
from splice.base.dense import device_of, in_linear_layout
from splice.base.layers import LayerKind, features, kind_of
from splice.base.weight_access import dense_weight, is_plain
from splice.kinds.additive import Additive
from splice.kinds.container import Container
from splice.kinds.effect import Action
from splice.kinds.host import Host
from splice.kinds.layer import AdapterLayer
from splice.kinds.registry import method_of_layer
from splice.selection import NOTHING


class Adapts(Protocol):
    """An adapted layer, as far as this file knows it."""

    splice_host: Host


class View:
    """An attribute that gives way to anything of the same name on the object or on its own class."""

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
        for own_values in (vars(layer), host.base._parameters, host.base._buffers, host.base._modules):
            if self.name in own_values:
                return own_values[self.name]
        for cls in host.original.__mro__:
            if self.name in cls.__dict__:
                own: object = cls.__dict__[self.name]
                return own.__get__(layer, owner) if isinstance(own, (FunctionType, property)) else own
        return self.read(host)

    def __set__(self, layer: Adapts, value: object) -> None:
        # What is set on the object would hide what is true.
        host = layer.splice_host
        if self.name in vars(layer) or any(self.name in cls.__dict__ for cls in host.original.__mro__):
            vars(layer)[self.name] = value  # the base's own
            return
        numbers = self.read(host)
        if not isinstance(numbers, NumbersView) or not isinstance(value, Mapping):
            raise AttributeError(
                f"{host.place}: {self.name!r} tells what the adapters of the layer are, and cannot be set. They are changed "
                "by `set_adapter`, `enable_adapters`, `set_scale`, `merge`, `delete_adapter`; single numbers: "
                "`layer.scaling[adapter_name] = ...`."
            )
        for adapter_name, number in value.items():
            numbers[adapter_name] = number

    def __delete__(self, layer: Adapts) -> None:
        del vars(layer)[self.name]


def method_view(function: Callable[..., object]) -> View:
    """A method that gives way like a `View`."""
    view = View(lambda host: partial(function, host.base))
    view.__doc__ = function.__doc__
    return view


# Pairs of an adapted class and a class of adapter layers whose names it has been given.
_published: set[tuple[type, type]] = set()


def publish(cls: type, adapter: AdapterLayer) -> None:
    """Give the adapted class `cls` a view for everything that is read on layers with this kind of adapter layer."""
    if (cls, type(adapter)) in _published:
        return
    # On the class, when the first such adapter comes. `__getattr__` would be asked for each name that the layer lacks.
    method = method_of_layer(adapter)
    views = {} if method is None else {**method.layer_views, **dict.fromkeys(method.containers)}
    commands = {} if method is None else method.layer_methods
    for name in (*adapter.numbers, *views, *commands):
        if name not in cls.__dict__:
            view = View(partial(_found, name))
            view.name = name
            setattr(cls, name, view)
    _published.add((cls, type(adapter)))


def _found(name: str, host: Host) -> object:
    """What the adapter layers of a layer have of this name, each its own.

    Raises:
        AttributeError: none of them knows the name.
    """
    numbers = {n: a for n, a in host.layers.items() if name in a.numbers and a.numbers[name] in vars(a)}
    if numbers:
        return NumbersView(next(iter(numbers.values())).numbers[name], numbers)
    methods = {n: method for n, a in host.layers.items() for method in [method_of_layer(a)] if method is not None}
    viewed = {n: method.layer_views[name] for n, method in methods.items() if name in method.layer_views}
    if viewed:
        return ReadOnly(name, {n: read(host.layers[n]) for n, read in viewed.items()})
    for method in methods.values():
        if name in method.layer_methods:
            return partial(method.layer_methods[name], host)
        if name in method.containers:
            return Container()  # of tensors that no adapter here has; those that one has stand in the tree
    raise AttributeError(f"{host.original.__name__!r} object has no attribute {name!r}")


class ReadOnly(dict[str, object]):
    """What follows from the config of each adapter of a layer, by its name."""

    def __init__(self, name: str, values: Mapping[str, object]) -> None:
        super().__init__((adapter, value) for adapter, value in values.items() if value is not None)
        self._name = name

    def __setitem__(self, adapter: str, value: object) -> None:
        raise TypeError(f"{self._name} of adapter {adapter!r} follows from its config, and cannot be set on a layer")

    def __delitem__(self, adapter: str) -> None:
        raise TypeError(f"{self._name} of adapter {adapter!r} goes with the adapter: use `delete_adapter`")

    def __reduce__(self) -> tuple[type, tuple[dict[str, object]]]:
        return dict, (dict(self),)


class NumbersView(MutableMapping[str, object], dict[str, object]):  # type: ignore[metaclass, misc]
    """One number of every adapter layer of a layer that has it: `layer.scaling["default"]`, also to set it."""

    # A dict for whoever asks: for `json`, and for programs that tell numbers by adapter from one number. What it holds as
    # one is never read: values change while somebody has it.

    def __init__(self, attribute: str, layers: Mapping[str, AdapterLayer]) -> None:
        self._attribute = attribute
        # Those that have worked the number out. A class may declare it for kinds of layers that have none.
        self._layers = dict(layers)
        dict.update(self, self.copy())

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
        return repr(self.copy())

    def copy(self) -> dict[str, object]:
        """As they are now."""
        return {name: self[name] for name in self}

    def __reduce__(self) -> tuple[type, tuple[dict[str, object]]]:
        return dict, (self.copy(),)


def _without_adapters(host: Host, *args: object, **kwargs: object) -> object:
    with host.selection.for_this_call(NOTHING):
        return host.base.forward(*args, **kwargs)


def _active(host: Host) -> list[str]:
    return list(host.selection.active)


def _features(host: Host) -> tuple[int, int]:
    if kind_of(host.base) is None:
        raise AttributeError(f"a {host.original.__name__} has no number of features")
    return features(host.base)


def delta_weight(host: Host, adapter_name: str) -> torch.Tensor:
    """See `AdaptedViews.get_delta_weight`."""
    adapter = host.layers[adapter_name]
    weight = host.base._parameters.get("weight") if is_plain(host.base) else dense_weight(host.base)
    adds = (
        isinstance(adapter, Additive) and adapter.action is Action.ADDS and not (adapter.reads_weight and adapter.shows)
    )
    if adds and weight is not None:
        delta = adapter.delta_weight(weight)
        if delta is not None:
            return in_linear_layout(host.base, delta)
    raise NotImplementedError(
        f"{host.place}: what adapter {adapter_name!r} makes of the weight is not something that is added to it. "
        "Merge it (`merge_adapter`) and compare the weights."
    )


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
    active_adapter = View(_active)
    _active_adapter = View(_active)
    disable_adapters = View(lambda host: not host.selection.enabled)
    _disable_adapters = View(lambda host: not host.selection.enabled)
    in_features = View(lambda host: _features(host)[0])
    out_features = View(lambda host: _features(host)[1])
    fan_in_fan_out = View(lambda host: kind_of(host.base) is LayerKind.TRANSPOSED_LINEAR)
    cast_input_dtype_enabled = View(lambda host: host.casts_input)
    base_layer = View(bare_layer)
    original_module = View(bare_layer)

    @method_view
    def get_base_weight(self) -> torch.Tensor:
        """The layer's own weight, without adapters."""
        base = self.splice_host.base
        own = base._parameters.get("weight")
        return own if own is not None and is_plain(base) else dense_weight(base)

    @method_view
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What merging the adapter adds to the weight, in its shape.

        Raises:
            KeyError: the adapter is not on this layer.
            NotImplementedError: it does more than add something that is worked out of its own tensors.
        """
        return delta_weight(self.splice_host, adapter)

    @method_view
    def update_layer(self, adapter_name: str, *args: object, **kwargs: object) -> None:
        """Refused: an adapter is planned for a model as a whole, and its layers are made from that plan."""
        raise NotImplementedError(
            f"{self.splice_host.place}: an adapter cannot be put on one layer by `update_layer`, as the model would not "
            f"know of it. Use `model.add_adapter({adapter_name!r}, config)` with `target_modules=[...]`, or "
            "`inject_adapter_in_model(config, model, adapter_name)`."
        )

    @method_view
    def _all_available_adapter_names(self) -> list[str]:
        """The adapters that are on this layer, sorted."""
        return sorted(self.splice_host.layers)

    @method_view
    def _get_available_adapters(self) -> set[str]:
        """The adapters that are on this layer."""
        return set(self.splice_host.layers)

    @method_view
    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter's tensors to `device`, or to where the layer computes; those without values stay."""
        host = self.splice_host
        if adapter_name in host.layers:
            for registry, name, _ in host.layers[adapter_name].registered.values():
                if registry[name].device.type != "meta":
                    registry[name].data = registry[name].data.to(device_of(host.base) if device is None else device)

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
