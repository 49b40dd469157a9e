"""Parents that read a layer's weights instead of calling it, and so would step around what is put on it.

torch's fused transformer encoder takes `linear1.weight` itself in eval mode, and `nn.MultiheadAttention` never calls
its `out_proj`. While a layer below such a parent is adapted, the parent is guarded: the fused path is switched off by
the parent's own switch, and attention is shown the adapted weight. The last adapter to leave takes the guard with it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from splice.kinds.layer import AdapterLayer

GUARD = "splice_guard"
# Held while a layer's tensors read as others than its own: another thread may call the same layer with another selection.
SHOWING = threading.RLock()


def weight_readers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of `modules` that read weights of the layers below them, by path."""
    return {path: module for path, module in modules.items() if isinstance(module, _READERS)}


def readers_above(readers: Mapping[str, nn.Module], path: str) -> list[nn.Module]:
    """Those of `readers` that the layer at `path` is below."""
    return [module for above, module in readers.items() if not above or path.startswith(above + ".")]


def guard_reader(parent: nn.Module, path: str) -> None:
    """Keep `parent` from stepping around the layer at `path`, until it is released."""
    guard = parent.__dict__.get(GUARD)
    if guard is None:
        cls = next(c for c in _READERS if isinstance(parent, c))
        was = getattr(parent, _SWITCH[cls]) if cls in _SWITCH else None
        guard = parent.__dict__[GUARD] = {"users": set(), "class": cls, "was": was}
    guard["users"].add(path)
    if guard["class"] in _SWITCH:
        setattr(parent, _SWITCH[guard["class"]], False)
    elif not isinstance(parent, _ShowsAdaptedWeights):
        parent.__class__ = _shown_class(type(parent))


def release_reader(parent: nn.Module, path: str) -> None:
    """The layer at `path` is adapted no longer; with the last one the parent is what it was."""
    guard = parent.__dict__.get(GUARD)
    if guard is None:
        return
    guard["users"].discard(path)
    if guard["users"]:
        return
    if guard["class"] in _SWITCH:
        setattr(parent, _SWITCH[guard["class"]], guard["was"])
    else:
        parent.__class__ = below_guard(type(parent))
    del parent.__dict__[GUARD]


# The attribute by which each class decides, at every call, whether it may take the fused path.
_SWITCH: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
_READERS: tuple[type[nn.Module], ...] = (*_SWITCH, nn.MultiheadAttention)
_shown_classes: dict[type[nn.Module], type[nn.Module]] = {}


class _ShowsAdaptedWeights:
    """Mixed into an attention whose `out_proj` is adapted: during a call, `out_proj.weight` is the adapted weight."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(SHOWING)
            for child in cast(nn.Module, self).children():
                if "splice_host" in child.__dict__:
                    stack.enter_context(adapted_weight_shown(child))
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        from splice.surgery.adapted import Adapted, original_class

        layer = cast(nn.Module, self)
        adapted = isinstance(layer, Adapted)
        return _new_shown, (original_class(layer) if adapted else below_guard(type(layer)), adapted), self.__dict__


def _shown_class(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _shown_classes:
        _shown_classes[cls] = type(f"Adapted{cls.__name__}", (_ShowsAdaptedWeights, cls), {})
    return _shown_classes[cls]


def _new_shown(cls: type[nn.Module], adapted: bool) -> nn.Module:
    from splice.surgery.adapted import adapted_class

    shown = _shown_class(adapted_class(cls) if adapted else cls)
    return shown.__new__(shown)


def below_guard(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` without the class that a guard put on top."""
    return cls.__mro__[2] if issubclass(cls, _ShowsAdaptedWeights) else cls


def with_guard_of(layer: nn.Module, cls: type[nn.Module]) -> type[nn.Module]:
    """`cls`, with the guard's class on top if `layer` has it: attention may be guarded and adapted itself, in this order."""
    return _shown_class(cls) if isinstance(layer, _ShowsAdaptedWeights) else cls


@contextmanager
def adapted_weight_shown(layer: Any) -> Iterator[None]:
    """Inside, `layer.weight` and `layer.bias` read as the weights that the selected adapters amount to."""
    from splice.surgery.adapted import in_order

    host = layer.splice_host
    choice = host.selection.current()
    if choice.rows is not None:
        raise ValueError(f"{host.path}: its weight is read by its parent, so rows cannot have adapters of their own")
    host.reached = True
    own: dict[str, Any] = layer.__dict__
    shown: set[str] = set()
    try:
        for name in in_order(host.layers, choice.names):
            adapter = host.layers[name]
            if name in host.merged:
                continue
            if not adapter.mergeable:
                raise NotImplementedError(
                    f"{host.path}: adapter {name!r} cannot be applied to a weight that is only read"
                )
            # Each sees what those before it show.
            for step in (adapter.shown, partial(_with_deltas, adapter)):
                found = step(layer)
                own.update(found)
                shown.update(found)
        yield
    finally:
        for name in shown:
            del own[name]


def _with_deltas(adapter: AdapterLayer, layer: Any) -> dict[str, torch.Tensor]:
    current = {"weight": layer.weight, "bias": layer.bias}
    return {n: (current[n] + delta).to(current[n].dtype) for n, delta in adapter.deltas(current).items()}
