"""Dense weights in the place of quantised ones, on the layers that are there, and back where what follows fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from splice.base.backends import marks
from splice.base.backends.finding import backend_of
from splice.base.bare import HOST, bare_children, original_class, walk_bare
from splice.base.foreign_models import dtype_said, forward_places
from splice.base.layers import LayerKind, features, kind_of
from splice.base.weight_access import bias_of, check_readable, dense_weight
from splice.errors import UnsupportedFeatureError
from splice.kinds.host import host_of
from splice.surgery.adapted_layer import Adapted
from splice.surgery.generated import generated
from splice.surgery.reading import publish_tensors
from splice.surgery.tuner import Tuner


class _Was(NamedTuple):
    """A layer as it was."""

    # The layer.
    layer: nn.Module
    # Its class.
    cls: type[nn.Module]
    # The class that it has without adapters.
    original: type[nn.Module]
    # What stood in its own dict.
    state: dict[str, Any]


@contextmanager
def dequantised(tuner: Tuner, wanted: bool) -> Iterator[None]:
    """Where it is `wanted`, the quantised layers of a network are dense ones from here on, unless the block fails.

    Raises:
        UnsupportedFeatureError: a weight cannot be read, or a layer has a forward of its own. Nothing has been changed.
    """
    if not wanted:
        yield
        return
    network = tuner.model
    layers = {path: layer for path, layer in walk_bare(network).items() if backend_of(layer) is not None}
    for path, layer in layers.items():
        check_readable(layer, path, "`dequantize=True`")
        if forward_places(layer):
            raise UnsupportedFeatureError(
                f"{path}: it has a forward of its own, as accelerate's hooks are, and cannot become a dense layer. Remove it "
                "first (`accelerate.hooks.remove_hook_from_submodules`)."
            )
    merged = list(tuner.merged)
    if merged:
        tuner.unmerge_adapter()
    done: list[_Was] = []
    try:
        for layer in layers.values():
            done.append(_Was(layer, type(layer), original_class(layer), dict(vars(layer))))
            _become_dense(layer, dtype_said(network))
        if merged:
            tuner.merge_adapter(merged)
        yield
    except BaseException:
        for was in reversed(done):
            _put_back(was)
        raise
    marks.forget(network)


@torch.no_grad()
def _become_dense(layer: nn.Module, dtype: torch.dtype | None) -> None:
    is_embedding, (first, second) = kind_of(layer) is LayerKind.EMBEDDING, features(layer)
    weight, bias = dense_weight(layer), bias_of(layer)
    if dtype is not None and dtype.is_floating_point:
        weight = weight.to(dtype)
    cls = nn.Embedding if is_embedding else nn.Linear
    made = nn.Embedding(first, second, device="meta") if is_embedding else nn.Linear(first, second, device="meta")
    state = dict(vars(made))
    state["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    if not is_embedding:
        plain = bias is None or isinstance(bias, nn.Parameter)
        state["_parameters"]["bias"] = bias if plain or bias is None else nn.Parameter(bias, requires_grad=False)
    _take_on(layer, cls, state)


def _take_on(layer: nn.Module, cls: type[nn.Module], state: Mapping[str, Any]) -> None:
    """Let `layer` be of class `cls`, with these things in its dict beside its hooks and adapters."""
    old, host = vars(layer), host_of(layer)
    kept = {
        key: value for key, value in old.items() if key.endswith(("_hooks", "_hooks_with_kwargs", "_always_called"))
    }
    own = {name for name, _ in bare_children(layer)}
    children = {name: child for name, child in layer._modules.items() if name not in own}
    new = {**state, **kept, "training": layer.training, "_modules": children}
    if host is not None:
        new[HOST] = host
        host.original = cls
        adapted = generated(Adapted, cls)
        old.clear()
        old.update(new)
        publish_tensors(adapted, layer, cls)
        layer.__class__ = adapted
        return
    old.clear()
    old.update(new)
    layer.__class__ = cls


def _put_back(was: _Was) -> None:
    host = host_of(was.layer)
    if host is not None:
        host.original = was.original
    own = vars(was.layer)
    own.clear()
    own.update(was.state)
    was.layer.__class__ = was.cls
