"""What a trained copy of a module is made of: a quantised layer is copied as a dense one, since codes cannot be trained."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from splice.base.backends.finding import backend_of
from splice.base.bare import bare_children, walk_bare
from splice.base.layers import LayerKind, features, kind_of
from splice.base.weight_access import bias_of, dense_weight, is_plain


def dense_twin(layer: nn.Module) -> nn.Module:
    """A dense layer of the kind and sizes of a quantised one, without values, in the dtype that it computes in."""
    backend, (first, second) = backend_of(layer), features(layer)
    assert backend is not None
    dtype = backend.dtype(layer) or torch.float32
    if kind_of(layer) is LayerKind.EMBEDDING:
        twin: nn.Module = nn.Embedding(first, second, device="meta", dtype=dtype)
    else:
        twin = nn.Linear(first, second, bias=bias_of(layer) is not None, device="meta", dtype=dtype)
    return twin.train(layer.training)


def twins_in(module: nn.Module) -> dict[int, nn.Module]:
    """By the id of each quantised layer in `module`, the dense one that stands for it in a copy."""
    return {id(layer): dense_twin(layer) for layer in walk_bare(module).values() if not is_plain(layer)}


def tensors_to_copy(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """As `own_tensors`, with the tensors of dense layers, without values, in the places of quantised ones."""
    if not is_plain(module):
        yield from ((prefix + name, parameter) for name, parameter in dense_twin(module).named_parameters())
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in bare_children(module):
        yield from tensors_to_copy(child, f"{prefix}{name}.")


def values_to_copy(module: nn.Module, name: str) -> torch.Tensor:
    """The values of one of `tensors_to_copy`, by its name there."""
    parent, _, leaf = name.rpartition(".")
    layer = module.get_submodule(parent)
    if is_plain(layer):
        found = layer._parameters.get(leaf)
        return layer._buffers[leaf] if found is None else found  # type: ignore[return-value]
    bias = bias_of(layer)
    return dense_weight(layer) if leaf == "weight" or bias is None else bias
