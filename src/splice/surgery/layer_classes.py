"""The classes by which layers with an adapter of one method are recognised: `LoraLayer`, and one for each kind of layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial

from splice.base.backends.marks import QUANTISED_LINEARS, quantised_linear
from splice.base.layers import LayerKind, kind_of
from splice.checkpoint.types import PeftType
from splice.kinds.layer import AdapterLayer
from splice.kinds.registry import Method, all_methods, method_of_layer
from splice.surgery.isinstance_classes import layer_of

# How the reference calls its layers of each kind.
_KINDS: Mapping[LayerKind, str] = {
    LayerKind.LINEAR: "Linear",
    LayerKind.EMBEDDING: "Embedding",
    LayerKind.CONV1D: "Conv1d",
    LayerKind.CONV2D: "Conv2d",
    LayerKind.CONV3D: "Conv3d",
    LayerKind.ATTENTION: "MultiheadAttention",
}


def stem(method: Method) -> str:
    """What the names of a method's classes begin with."""
    return method.config.__name__.removesuffix("Config")


def _is_of(layer: AdapterLayer, method: Method) -> bool:
    of = method_of_layer(layer)
    return of is not None and issubclass(of.config, method.config)


@cache
def layer_classes(name: PeftType) -> dict[str, type]:
    """The classes by which layers with an adapter of this method are recognised, by their names in the reference."""
    method = all_methods()[name]
    if not method.layers and method.other_layer is None:
        return {}
    every = layer_of(
        f"{stem(method)}Layer",
        lambda layer: _is_of(layer, method),
        tensor_names=method.containers or method.tensor_names,
    )
    found = {every.__name__: every}
    for kind, called in _KINDS.items():
        if kind in method.layers:
            found[called] = layer_of(called, partial(_is_on, method=method, kind=kind), every)
    for called in QUANTISED_LINEARS if LayerKind.LINEAR in method.layers else ():
        on = partial(_is_on, method=method, kind=LayerKind.LINEAR, quantised=called)
        found[called] = layer_of(called, on, every)
    for called, what in method.names.items():
        if isinstance(what, type) and issubclass(what, AdapterLayer):
            found[called] = layer_of(called, partial(_is_a, what=what), every)
    if method.parameters_layer is not None:
        found["ParamWrapper"] = layer_of("ParamWrapper", partial(_is_a, what=method.parameters_layer), every)
    return found


def _is_on(layer: AdapterLayer, method: Method, kind: LayerKind, quantised: str = "") -> bool:
    on = kind_of(layer.base)
    on = LayerKind.LINEAR if on is LayerKind.TRANSPOSED_LINEAR else on
    if on is not kind or quantised_linear(layer.base) != quantised:
        return False
    return _is_of(layer, method) and type(layer) is not method.parameters_layer


def _is_a(layer: AdapterLayer, what: type[AdapterLayer]) -> bool:
    return isinstance(layer, what)
