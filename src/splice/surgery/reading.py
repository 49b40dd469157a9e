"""What an adapted layer's own tensors read as, when somebody else than the layer reads them.

A parent that takes `layer.weight` instead of calling the layer steps around the adapters on it. So the attribute gives
what the selected adapters make of the weight: to all code that runs inside a call of a module which the layer is part of.
Everybody else reads the base's tensor, with one exception: where an adapter has put a copy in the layer's place, or rows of
tokens, these are the layer's weight for everybody, as a loss that multiplies with `lm_head.weight` outside of any call
takes for granted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from functools import partial
from types import CodeType, FrameType, MethodType

import torch
from torch import nn

from splice.base.bare import HOST
from splice.base.dense import in_linear_layout
from splice.base.foreign_models import READ_THE_REGISTERED, forward_places, is_called_from, is_hooked
from splice.base.weight_access import dense_tensors, is_plain
from splice.kinds.computing import computing, reading_as
from splice.kinds.host import Host, in_order
from splice.kinds.layer import AdapterLayer
from splice.kinds.module_copy import WholeModule
from splice.surgery.unmade import Unmade


class Reader(Enum):
    """Who reads a tensor of a layer."""

    # The layer's own machinery: its hooks, or a function that wants the tensor which is registered, to move it for one.
    ITSELF = "itself"
    # Code inside a call of a module that the layer is part of.
    NETWORK = "network"
    # Anybody else.
    OTHERS = "others"


class OwnTensor:
    """The attribute of a parameter, on the class of an adapted layer."""

    # No data descriptor: what stands in the object's own dict comes first, as ever. Not `__getattr__`, which compiled
    # graphs do not ask for parameters.

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, layer: nn.Module | None, owner: type) -> object:
        if layer is None:
            return self
        name, parameters = self.name, layer._parameters
        if name not in parameters:
            raise AttributeError(name)  # and then torch looks in its other registries
        own, host, running = parameters[name], layer.__dict__.get(HOST), computing.stack
        # As nearly always, when the layer computes and nothing stands in for its own: a decode step asks some times a layer.
        if len(running) == 1 and running[0][0] is host and not running[0][1]:
            return own
        if host is None:
            return own
        its_own = False
        for of, tensors in reversed(running):
            if of is host:
                if name in tensors:
                    return tensors[name]
                its_own = True
        return own if its_own else _read(layer, host, name, own)


def publish_tensors(cls: type[nn.Module], layer: nn.Module, original: type[nn.Module]) -> None:
    """Let the parameters of `layer` be read by way of this file, on all layers of its class `cls`."""
    for name in layer._parameters:
        # A class that has its own way to this name keeps it (parametrisations do).
        if name not in cls.__dict__ and not any(name in c.__dict__ for c in original.__mro__):
            setattr(cls, name, OwnTensor(name))


def _read(layer: nn.Module, host: Host, name: str, own: torch.Tensor | None) -> torch.Tensor | None:
    choice = host.selection.current()
    names = choice.names if choice.rows is None else tuple(dict.fromkeys(choice.rows.names))
    names = tuple(n for n in in_order(host.layers, names) if n not in host.merged)
    if host.displaced and host.shows_displaced and host.displaced_by not in names:
        own = host.displaced.get(name, own)
    changing = tuple(n for n in names if _changes(host.layers[n], name))
    if not changing or (not is_plain(layer) and _is_read_by_itself(layer)):
        return own
    reader = _reader(layer)
    if reader is Reader.ITSELF:
        return own
    if reader is Reader.OTHERS:
        changing = tuple(n for n in changing if host.layers[n].stands_in)
        if not changing or choice.rows is not None:
            return own
        host.reached = True
        return adapted_tensors(layer, host, changing).get(name)
    if own is not None and (own.is_meta or not own.is_floating_point()):
        host.read = True  # what it holds is no weight that anything could be added to; the first call says so
        return own
    return _for_network(layer, host, name, own, names, rows=choice.rows is not None)


def _changes(adapter: AdapterLayer, name: str) -> bool:
    if name in adapter.changed_names or (name == "bias" and adapter.trained_bias is not None):
        return True
    return isinstance(adapter, WholeModule) and adapter.module._parameters.get(name) is not None


def _for_network(
    layer: nn.Module, host: Host, name: str, own: torch.Tensor | None, names: Sequence[str], rows: bool
) -> torch.Tensor | None:
    refused = _refusal(host, names, rows)
    make = partial(_refuse, refused) if refused is not None else partial(_made, layer, host, names, name)
    # Most of those who read a weight want to know its dtype. While there are gradients it is worked out at once all the
    # same: code in C++ would not find them behind a tensor that is not made yet.
    at_once = refused is None and _needs_gradients(host, own, names)
    if own is None or at_once or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return make()
    return Unmade(own, make)


def _made(layer: nn.Module, host: Host, names: Sequence[str], name: str) -> torch.Tensor:
    host.reached = True
    return adapted_tensors(layer, host, names)[name]


def _refuse(error: Exception) -> torch.Tensor:
    raise error


def _refusal(host: Host, names: Sequence[str], rows: bool) -> Exception | None:
    """Why the selected adapters cannot be applied to a weight that is only read; None if they can."""
    if rows:
        return ValueError(f"{host.path}: its weight is read by its parent, so rows cannot have adapters of their own")
    for name in names:
        adapter, what = host.layers[name], f"{host.path}: adapter {name!r}"
        if not adapter.mergeable or not adapter.merges_exactly:
            return NotImplementedError(
                f"{what} cannot be applied to a weight that is only read, which the module around it does instead of "
                "calling the layer. Leave the layer out with `exclude_modules`."
            )
        lacking = [n for n in adapter.changed_names if host.base._parameters.get(n) is None]
        if lacking:
            return NotImplementedError(
                f"{what} changes the {lacking[0]} of a layer that has none, and is read instead of being called"
            )
    return None


def _needs_gradients(host: Host, own: torch.Tensor | None, names: Sequence[str]) -> bool:
    if not torch.is_grad_enabled():
        return False
    tensors = [registry[key] for n in names for registry, key, _ in host.layers[n].registered.values()]
    return (own is not None and own.requires_grad) or any(tensor.requires_grad for tensor in tensors)


def adapted_tensors(layer: nn.Module, host: Host, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors of a layer as these adapters make them, one after the other; gradients flow.

    As merging does it, but for copies of the whole layer, whose tensors take the place of the base's here.
    """
    current = dense_tensors(layer)
    if host.displaced and host.shows_displaced:
        current.update(host.displaced)
    # What the mathematics of a method reads on the layer is what those before it have made.
    with reading_as(host, current):
        for name in names:
            adapter = host.layers[name]
            if isinstance(adapter, WholeModule):
                current.update(adapter.shown(layer))
                continue
            if adapter.trained_bias is not None:
                current["bias"] = adapter.trained_bias
            current.update(adapter.replaced(current))
            current.update(_with_deltas(layer, adapter, current))
    return current


def _with_deltas(layer: nn.Module, adapter: AdapterLayer, current: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    seen = dict(current)
    if adapter.linear_layout and "weight" in seen:
        seen["weight"] = in_linear_layout(layer, seen["weight"])
    found = {}
    for name, delta in adapter.deltas(seen).items():
        stored = in_linear_layout(layer, delta) if name == "weight" and adapter.linear_layout else delta
        found[name] = (current[name] + stored).to(current[name].dtype)
    return found


def _is_replaced(layer: nn.Module) -> bool:
    """Whether somebody has put a forward of their own on `layer` after it was adapted; hooks go around it instead."""
    places = forward_places(layer)
    if not places or is_hooked(layer):
        return False
    standing = places[-1].forward
    return not (isinstance(standing, MethodType) and standing.__func__ is type(layer).forward)


def _is_read_by_itself(layer: nn.Module) -> bool:
    """Whether a method of `layer` reads its tensor: one that stores it in a form of its own means that form."""
    caller = sys._getframe(3)
    return caller.f_code.co_varnames[:1] == ("self",) and caller.f_locals["self"] is layer


_CALL: CodeType = nn.Module._call_impl.__code__


def _reader(layer: nn.Module) -> Reader:
    """Who reads `layer` now."""
    # By the frames of this thread, which cost a few microseconds, and only those who read. To know it otherwise, every call
    # of every module that has an adapted layer below it would have to say that it begins, and its class would change.
    if torch.compiler.is_compiling():
        return Reader.NETWORK  # what is being compiled is a call; frames would break the graph
    calls: list[nn.Module] = []
    frame: FrameType | None = sys._getframe(3)
    assert frame is not None
    if is_called_from(frame, READ_THE_REGISTERED):
        return Reader.ITSELF
    while frame is not None:
        if frame.f_code is _CALL:
            module: nn.Module = frame.f_locals["self"]
            if module is layer and not calls:
                return Reader.OTHERS if _is_replaced(layer) else Reader.ITSELF
            if any(child is layer for child in module._modules.values()):
                return Reader.NETWORK
            calls.append(module)
        frame = frame.f_back
    # The outermost first: if it is none of them, it is rarely far away.
    inside = any(below is layer for module in reversed(calls) for below in module.modules())
    return Reader.NETWORK if inside else Reader.OTHERS
