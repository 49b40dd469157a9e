"""The class swap: a base layer becomes an adapted layer by taking on a generated subclass of its own class.

The object, its parameters and their names stay what they are; `isinstance(layer, nn.Linear)` stays true. What torch's
FSDP2 and `parametrize` do to modules is done here for the same reasons: nothing that holds the layer has to learn of it.
Wrapping the layer in another module instead would rename every parameter below it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from splice.base.layers import ADAPTERS
from splice.kinds.layer import AdapterLayer, Forward, LightModule
from splice.selection import Rows, Selection
from splice.surgery.commands import LayerCommands
from splice.surgery.layer_attributes import AdaptedViews, publish
from splice.surgery.rows import add_products, split
from splice.surgery.weight_readers import (
    SHOWING,
    below_guard,
    guard_reader,
    readers_above,
    release_reader,
    with_guard_of,
)

HOST = "splice_host"


class AdapterDict(LightModule):
    """The adapter layers of one adapted layer, by adapter name.

    Any string is a name here (`nn.ModuleDict` refuses dots and the names of its own methods). The train/eval mode is
    passed on only when it changes: `model.eval()` costs the same for one adapter and for a thousand.
    """

    _modules: dict[str, AdapterLayer]  # type: ignore[assignment]

    def train(self, mode: bool = True) -> AdapterDict:
        if mode is not self.training:
            super().train(mode)
        return self

    def __getitem__(self, name: str) -> AdapterLayer:
        return self._modules[name]

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def _load_from_state_dict(  # type: ignore[override]
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: list[str],
        *rest: Any,
    ) -> None:
        # torch takes what stands before the first dot for a child's name; here a name may have dots itself.
        known = tuple(f"{prefix}{name}." for name in self._modules)
        unexpected.extend(key for key in state_dict if key.startswith(prefix) and not key.startswith(known))

    def put(self, name: str, layer: AdapterLayer) -> None:
        if layer.training is not self.training:
            layer.train(self.training)
        self._modules[name] = layer

    def drop(self, name: str) -> AdapterLayer | None:
        return self._modules.pop(name, None)


@dataclass
class Host:
    """What an adapted layer knows about itself, beside what it was.

    Attributes:
        path: where it is in the base model.
        selection: shared by all adapted layers of the model.
        layers: its adapter layers by name (the very dict inside its `AdapterDict`).
        shows: whether some adapter layer shows tensors in place of the base's.
        reached: whether a call has come by since it was adapted.
        merged: adapters that are in its weights now, in the order they were merged.
        originals: the base parameters as they were before the first merge, by name.
        own_forward: a forward that stood on the object itself (accelerate's hooks, patches); it goes on being the base's.
        readers: parents that read the layer's weights and are guarded while it is adapted.
    """

    path: str
    selection: Selection
    layers: dict[str, AdapterLayer]
    shows: bool = False
    reached: bool = False
    merged: list[str] = field(default_factory=list)
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    own_forward: Forward | None = None
    readers: list[nn.Module] = field(default_factory=list)


class Adapted(AdaptedViews, LayerCommands, nn.Module):
    """Mixed into the class of an adapted layer: composes the selected adapter layers around the base's forward."""

    splice_host: Host
    splice_adapters: AdapterDict

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        host = self.splice_host
        host.reached = True
        if host.shows and not torch.compiler.is_compiling():
            with SHOWING:
                return self._forward_selected(host, *args, **kwargs)
        return self._forward_selected(host, *args, **kwargs)

    def _forward_selected(self, host: Host, *args: Any, **kwargs: Any) -> Any:
        choice = host.selection.current()
        run: Forward = super().forward if host.own_forward is None else host.own_forward
        if choice.rows is not None:
            return self._forward_rows(run, choice.rows, *args, **kwargs)
        for name in choice.names if len(choice.names) < 2 else in_order(host.layers, choice.names):
            layer = host.layers.get(name)
            if layer is not None and name not in host.merged:
                run = self._outside(layer, run)
        return run(*args, **kwargs)

    def _outside(self, layer: AdapterLayer, inner: Forward) -> Forward:
        return layer.wrapped(self._showing(layer, inner) if layer.shows else inner)

    def _showing(self, layer: AdapterLayer, inner: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            # An entry in the instance's dict is found before the parameter of the same name, which stays untouched.
            own, shown = self.__dict__, layer.shown(self)
            before = {name: own[name] for name in shown if name in own}
            own.update(shown)
            try:
                return inner(*args, **kwargs)
            finally:
                for name in shown:
                    del own[name]
                own.update(before)

        return run

    def _forward_rows(self, run: Forward, rows: Rows, *args: Any, **kwargs: Any) -> Any:
        """Each row of the batch with its own adapter: the base once for all rows, every adapter for its own."""
        host = self.splice_host
        together_only = next(iter(host.layers.values())).wrapped_rows(host.layers, rows, run)
        if together_only is not None:
            return together_only(*args, **kwargs)
        y = run(*args, **kwargs)
        written = False
        if not args or not isinstance(args[0], torch.Tensor) or not isinstance(y, torch.Tensor):
            raise TypeError(f"{host.path}: `adapter_names` needs layers that take one tensor and give one tensor")
        x = args[0]
        try:
            groups = rows.groups(x.shape[0], x.device)
        except ValueError as error:
            raise ValueError(f"{host.path}: {error}") from None
        together, single = split(groups, host.layers)
        if together:
            y, written = add_products(y, x, together), True
        for layer, group in single:
            base_rows = y[group.index]
            reuse = layer.keeps_input and not layer.shows
            inner: Forward = (lambda _, kept=base_rows: kept) if reuse else run
            if not written:  # what the base gave may be its input, or kept for a backward
                y, written = y.clone(), True
            shown = self._showing(layer, inner) if layer.shows else inner
            y[group.index] = layer.wrapped_for(shown, group.index)(x[group.index]).to(y.dtype)
        return y

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is generated, so pickle is told how to generate it again.
        return _new_adapted, (original_class(self),), self.__dict__

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"adapters={list(self.splice_host.layers)}")))


def in_order(layers: Mapping[str, AdapterLayer], names: Sequence[str]) -> list[str]:
    """Those of the active adapters that are on a layer, the innermost first."""
    present = [name for name in names if name in layers]
    flags = {layers[name].first_outside for name in present}
    if len(flags) > 1:  # of several methods: as they were added
        return sorted(present, key=list(layers).index)
    return present[::-1] if True in flags else present


def first_conflict(layers: Mapping[str, AdapterLayer], names: Sequence[str]) -> tuple[str, str, str] | None:
    """Two of these adapters that cannot take effect together on a layer, and why; None if all can."""
    present = [name for name in dict.fromkeys(names) if name in layers]
    for index, two in enumerate(present):
        for one in present[:index]:
            why = layers[two].conflict(layers[one])
            if why:
                return one, two, why
    return None


def _new_adapted(cls: type[nn.Module]) -> nn.Module:
    adapted = adapted_class(cls)
    return adapted.__new__(adapted)


_generated: dict[type[nn.Module], type[nn.Module]] = {}


def adapted_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `cls` that its adapted instances have."""
    if cls not in _generated:
        members = {"__module__": cls.__module__, "forward": _forward_like(cls)}
        _generated[cls] = type(f"Adapted{cls.__name__}", (Adapted, cls), members)
    return _generated[cls]


def _forward_like(cls: type[nn.Module]) -> Any:
    """`Adapted.forward` with the signature of the base's own: much code decides by it what it may pass."""
    own = Adapted.forward
    forward = FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    return forward


def original_class(layer: nn.Module) -> type[nn.Module]:
    """The class that `layer` has without adapters."""
    if not isinstance(layer, Adapted):
        return type(layer)
    # FSDP2 may have put a class of its own on top: the original follows the generated one.
    generated = next(c for c in type(layer).__mro__ if Adapted in c.__bases__)
    return generated.__bases__[1]  # type: ignore[no-any-return]


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


def detach(layer: nn.Module, name: str) -> None:
    """Take the adapter off; with its last adapter the layer becomes exactly what it was.

    Also of a layer whose `attach` was interrupted at any point.
    """
    host, adapters = layer.__dict__.get(HOST), layer._modules.get(ADAPTERS)
    if isinstance(adapters, AdapterDict):
        dropped = adapters.drop(name)
        if dropped is not None and dropped.shows and host is not None:
            host.shows = any(adapter.shows for adapter in host.layers.values())
    if host is not None and not host.layers:
        _swap_back(layer, host)


def _swap(layer: nn.Module, path: str, selection: Selection, readers: Mapping[str, nn.Module]) -> None:
    adapters = AdapterDict()
    adapters.training = layer.training
    cls = adapted_class(below_guard(type(layer)))
    host = Host(path, selection, adapters._modules, readers=readers_above(readers, path))
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


def _swap_back(layer: nn.Module, host: Host) -> None:
    for parent in host.readers:
        release_reader(parent, host.path)
    adapted, cls = below_guard(type(layer)), original_class(layer)
    layer.__class__ = with_guard_of(layer, cls)
    # A hook may have come or gone in the meantime; wherever our forward was left, the base's own takes its place.
    for name in ("_old_forward", "forward"):
        standing = layer.__dict__.get(name)
        if isinstance(standing, MethodType) and standing.__func__ is adapted.__dict__.get("forward"):
            layer.__dict__[name] = host.own_forward or cls.forward.__get__(layer)
    layer._modules.pop(ADAPTERS, None)
    del layer.__dict__[HOST]
