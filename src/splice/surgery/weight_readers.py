"""Parents that take more from a layer than its weights, and so would step around what is put on it.

torch's fused transformer encoder works out its layers by itself in eval mode. While a layer below such a parent is adapted,
the fused path is switched off by the parent's own switch; the last adapter to leave gives the switch back. All other code
that reads a weight is given the adapted one (`reading.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from splice.base.bare import GUARD, carried, original_class

# The attribute by which each class decides, at every call, whether it may take the fused path.
_SWITCH: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}


@dataclass(eq=False, repr=False)
class Guard:
    """What a parent carries while layers below it are adapted.

    Attributes:
        original: the class that the parent has.
        switch: the attribute by which it decides whether it takes its fused path.
        was: the switch as it was.
        users: paths of the adapted layers below.
    """

    original: type[nn.Module]
    switch: str
    was: object
    users: set[str] = field(default_factory=set)


def weight_readers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of `modules` that have a fused path around the layers below them, by path."""
    readers = tuple(_SWITCH)
    return {path: module for path, module in modules.items() if isinstance(module, readers)}


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
        switch = next(switch for cls, switch in _SWITCH.items() if isinstance(parent, cls))
        guard = parent.__dict__[GUARD] = Guard(original_class(parent), switch, getattr(parent, switch))
    guard.users.add(path)
    setattr(parent, guard.switch, False)


def release_reader(parent: nn.Module, path: str) -> None:
    """The layer at `path` is adapted no longer; with the last one the parent is what it was."""
    guard = guard_of(parent)
    if guard is None:
        return
    guard.users.discard(path)
    if guard.users:
        return
    setattr(parent, guard.switch, guard.was)
    del parent.__dict__[GUARD]
