"""What a base layer is: its kind and its geometry. Everything else asks here instead of probing classes."""

from __future__ import annotations

from enum import Enum

import torch
from torch import nn

from splice.base.backends.finding import linear_backend
from splice.base.foreign_models import full_shape


class LayerKind(Enum):
    """The kinds of base layer that adapters can be put on."""

    LINEAR = "weight (out, in)"
    TRANSPOSED_LINEAR = "weight (in, out), the Conv1D of transformers"
    EMBEDDING = "weight (vocabulary, dim)"
    CONV1D = "weight (out, in / groups, k)"
    CONV2D = "weight (out, in / groups, k, k)"
    CONV3D = "weight (out, in / groups, k, k, k)"
    ATTENTION = "in_proj_weight (3 * dim, dim) and an output projection, torch's own attention"


_KINDS: tuple[tuple[type[nn.Module], LayerKind], ...] = (
    (nn.Linear, LayerKind.LINEAR),
    (nn.Embedding, LayerKind.EMBEDDING),
    (nn.Conv1d, LayerKind.CONV1D),
    (nn.Conv2d, LayerKind.CONV2D),
    (nn.Conv3d, LayerKind.CONV3D),
    (nn.MultiheadAttention, LayerKind.ATTENTION),
)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# By class, so that the walk over its ancestors is made once for each class and not once for each layer.
_found: dict[type, LayerKind | None] = {}


def _kind_of_class(cls: type) -> LayerKind | None:
    for base, kind in _KINDS:
        if issubclass(cls, base):
            return kind
    # Matched by name, so that nobody pays for importing transformers who does not use it.
    for base in cls.__mro__:
        if base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils":
            return LayerKind.TRANSPOSED_LINEAR
    return None if linear_backend(cls) is None else LayerKind.LINEAR


def kind_of(layer: nn.Module) -> LayerKind | None:
    """The kind of `layer`, or None where adapters cannot be put on it."""
    cls = type(layer)
    if torch.compiler.is_compiling():  # a graph that looked into the table would be thrown away whenever that grows
        return _kind_of_class(cls)
    if cls not in _found:
        _found[cls] = _kind_of_class(cls)
    return _found[cls]


def features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer or of attention's input projection, (vocabulary, dim), (in, out) channels.

    Raises:
        TypeError: the layer is of no kind that adapters can be put on.
    """
    # From what the layer says of itself, not from its weight: packed and sharded weights have other shapes.
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, _CONVOLUTIONS):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim, 3 * layer.embed_dim
    weight = layer._parameters.get("weight")
    if kind_of(layer) is LayerKind.TRANSPOSED_LINEAR and weight is not None:
        size_in, size_out = full_shape(weight)
        return size_in, size_out
    backend = linear_backend(type(layer))
    if backend is not None:
        return backend.features(layer)
    raise TypeError(f"{type(layer).__name__} is no layer that an adapter can be put on")


def kernel_size(layer: nn.Module) -> tuple[int, ...]:
    """The kernel of a convolution; () of any other layer."""
    return tuple(layer.kernel_size) if isinstance(layer, _CONVOLUTIONS) else ()


def pads_with_zeros(layer: nn.Module) -> bool:
    """Whether `layer` sees zeros beyond the edge of its input, or pads nothing; some convolutions repeat or mirror it."""
    return not isinstance(layer, _CONVOLUTIONS) or layer.padding_mode == "zeros"


def padding_row(layer: nn.Module) -> int | None:
    """The row of an embedding that gets no gradient (`padding_idx`); None where there is none, and of any other layer."""
    return layer.padding_idx if isinstance(layer, nn.Embedding) else None
