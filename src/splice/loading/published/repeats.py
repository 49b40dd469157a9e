"""Tensors of a checkpoint that only say once more what the base holds, under the names that it may have for them.

The reference writes the base's embeddings beside an adapter (`save_embedding_layers=True`, or where they are targets), and
people save all tensors of a model. What the base holds already need not be loaded; what differs is never left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from splice.checkpoint.keys import PREFIX, SHORT_PREFIX
from splice.kinds.reading import Checkpoint
from splice.loading.base_weight import base_tensors, says_the_same

# What stands between a layer's path and its own names in the memory of the reference, once an adapter is on it.
_BEFORE_OWN_NAMES = ("base_layer.", "token_adapter.base_layer.", "original_module.")


class Repeats(NamedTuple):
    """Names of a checkpoint that are those of the base's own tensors."""

    # Those whose tensors are the base's.
    equal: tuple[str, ...] = ()
    # Those of the same shape with other values.
    different: tuple[str, ...] = ()


def repeats_of_base(names: Collection[str], checkpoint: Checkpoint, modules: Mapping[str, nn.Module]) -> Repeats:
    """Which of these names of `checkpoint` repeat tensors of the base, whose modules are `modules`."""
    equal: list[str] = []
    different: list[str] = []
    for name, own in _own_tensors_named(names, modules):
        # Nothing can be said of weights without values.
        if own.is_meta or checkpoint.weights.entries[checkpoint.names[name]].shape != tuple(own.shape):
            continue
        # One after the other: embeddings are large, and each is thrown away once it has been compared.
        (stored,) = checkpoint.weights.read([checkpoint.names[name]])
        (equal if says_the_same(stored, own) else different).append(name)
    return Repeats(tuple(equal), tuple(different))


def _own_tensors_named(names: Collection[str], modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        front, _, leaf = name.rpartition(".")
        # Where an adapter acts on the call of the network, nothing is wrapped, and the names have half of the prefix.
        for prefix in (PREFIX, SHORT_PREFIX):
            module = _module_named(front[len(prefix) :], modules) if front.startswith(prefix) else None
            own = None if module is None else base_tensors(module).get(leaf)
            if own is not None:
                yield name, own
                break


def _module_named(front: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    # The longest path first, as a module of the base may be called `base_layer` itself.
    paths = (f"{front}.".removesuffix(f".{before}") for before in _BEFORE_OWN_NAMES)
    return next((modules[path] for path in (front, *paths) if path in modules), None)
