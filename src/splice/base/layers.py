"""What a base layer is: its kind and its geometry. Everything else asks here instead of probing classes."""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import nn


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


_found: dict[type, LayerKind | None] = {}


def _kind_of_class(cls: type) -> LayerKind | None:
    for base, kind in _KINDS:
        if issubclass(cls, base):
            return kind
    # Matched by name, so that nobody pays for importing transformers who does not use it.
    for base in cls.__mro__:
        if base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils":
            return LayerKind.TRANSPOSED_LINEAR
    return None


def kind_of(layer: nn.Module) -> LayerKind | None:
    """The kind of `layer`, or None where adapters cannot be put on it."""
    cls = type(layer)
    if cls not in _found:
        _found[cls] = _kind_of_class(cls)
    return _found[cls]


def features(layer: Any) -> tuple[int, int]:
    """(in, out) of a linear layer or of attention's input projection, (vocabulary, dim), (in, out) channels."""
    kind = kind_of(layer)
    if kind is LayerKind.LINEAR:
        return layer.in_features, layer.out_features
    if kind is LayerKind.EMBEDDING:
        return layer.num_embeddings, layer.embedding_dim
    if kind is LayerKind.TRANSPOSED_LINEAR:
        return layer.weight.shape[0], layer.weight.shape[1]
    if kind is LayerKind.ATTENTION:
        return layer.embed_dim, 3 * layer.embed_dim
    return layer.in_channels, layer.out_channels
