"""Parents that read a layer's weights instead of calling it, and so would step around what is put on it.

torch's fused transformer encoder takes `linear1.weight` itself in eval mode, and `nn.MultiheadAttention` never calls
its `out_proj`. While a layer below such a parent is adapted, the parent is guarded: the fused path is switched off by
the parent's own switch, and attention is shown the adapted weight. The last adapter to leave takes the guard with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import nn

from splice.base.bare import GUARD, carried, original_class
from splice.kinds.host import Host, host_of, in_order
from splice.kinds.layer import AdapterLayer
from splice.surgery.generated import Generated, generated


@dataclass(eq=False)
class Guard:
    """What a parent carries while layers below it are adapted.

    Attributes:
        original: the class that the parent had before.
        reader: the class among those known to read weights that it is of.
        was: the switch of its fused path as it was; None where it has no switch.
        users: paths of the adapted layers below.
    """

    original: type[nn.Module]
    reader: type[nn.Module]
    was: object
    users: set[str] = field(default_factory=set)


def weight_readers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of `modules` that read weights of the layers below them, by path."""
    return {path: module for path, module in modules.items() if isinstance(module, _READERS)}


def readers_above(readers: Mapping[str, nn.Module], path: str) -> list[nn.Module]:
    """Those of `readers` that the layer at `path` is below."""
    return [module for above, module in readers.items() if not above or path.startswith(above + ".")]


def guard_of(parent: nn.Module) -> Guard | None:
    """What `parent` carries; None where it is not guarded."""
    return cast("Guard | None", carried(parent, GUARD))


def guard_reader(parent: nn.Module, path: str) -> None:
    """Keep `parent` from stepping around the layer at `path`, until it is released."""
    guard = guard_of(parent)
    if guard is None:
        reader = next(cls for cls in _READERS if isinstance(parent, cls))
        was = getattr(parent, _SWITCH[reader]) if reader in _SWITCH else None
        guard = parent.__dict__[GUARD] = Guard(original_class(parent), reader, was)
    guard.users.add(path)
    # By the switch where there is one: torch's fused code takes more from the layers than their weights.
    if guard.reader in _SWITCH:
        setattr(parent, _SWITCH[guard.reader], False)
    elif not isinstance(parent, ShowsAdaptedWeights):
        parent.__class__ = generated(ShowsAdaptedWeights, type(parent))


def release_reader(parent: nn.Module, path: str) -> None:
    """The layer at `path` is adapted no longer; with the last one the parent is what it was."""
    guard = guard_of(parent)
    if guard is None:
        return
    guard.users.discard(path)
    if guard.users:
        return
    if guard.reader in _SWITCH:
        setattr(parent, _SWITCH[guard.reader], guard.was)
    else:
        parent.__class__ = below_guard(type(parent))
    del parent.__dict__[GUARD]


# The attribute by which each class decides, at every call, whether it may take the fused path.
_SWITCH: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
_READERS: tuple[type[nn.Module], ...] = (*_SWITCH, nn.MultiheadAttention)


class ShowsAdaptedWeights(Generated):
    """Mixed into an attention whose `out_proj` is adapted: during a call, `out_proj.weight` is the adapted weight."""

    def forward(self, *args: object, **kwargs: object) -> object:
        # Only during a call. Weights shown for good would be those that a save or an optimizer finds.
        with ExitStack() as stack:
            for child in cast(nn.Module, self).children():
                host = host_of(child)
                if host is not None:
                    stack.enter_context(host.lock)
                    stack.enter_context(adapted_weight_shown(child, host))
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def below_guard(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` without the class that a guard put on top."""
    guarded = next((c for c in cls.__mro__ if c.__bases__[:1] == (ShowsAdaptedWeights,)), None)
    return cls if guarded is None else guarded.__bases__[1]


def with_guard_of(layer: nn.Module, cls: type[nn.Module]) -> type[nn.Module]:
    """`cls`, with the guard's class on top if `layer` has it: attention may be guarded and adapted itself, in this order."""
    return generated(ShowsAdaptedWeights, cls) if isinstance(layer, ShowsAdaptedWeights) else cls


@contextmanager
def adapted_weight_shown(layer: nn.Module, host: Host) -> Iterator[None]:
    """Inside, `layer.weight` and `layer.bias` read as the weights that the selected adapters amount to."""
    choice = host.selection.current()
    if choice.rows is not None:
        raise ValueError(f"{host.place}: its weight is read by its parent, so rows cannot have adapters of their own")
    host.reached = True
    own = vars(layer)
    shown: set[str] = set()
    try:
        for name in in_order(host.layers, choice.names):
            adapter = host.layers[name]
            if name in host.merged:
                continue
            if not adapter.mergeable:
                raise NotImplementedError(
                    f"{host.place}: adapter {name!r} cannot be applied to a weight that is only read"
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


def _with_deltas(adapter: AdapterLayer, layer: nn.Module) -> dict[str, torch.Tensor]:
    # As attributes: they may be shown by an adapter before, and then are not what is registered.
    read = {"weight": layer.weight, "bias": layer.bias}
    current = {name: tensor for name, tensor in read.items() if isinstance(tensor, torch.Tensor)}
    return {n: (current[n] + delta).to(current[n].dtype) for n, delta in adapter.deltas(current).items()}
