"""A merged weight as its layer stores it, where that is no plain tensor, and what storing it so has lost."""

from __future__ import annotations

import torch

from splice.base.backends.finding import backend_of
from splice.base.weight_access import dense_from
from splice.kinds.host import Host
from splice.surgery.loss import StorageLoss
from splice.surgery.putting import Merged


def before_merging(host: Host) -> dict[str, torch.Tensor]:
    """The tensors of a layer from before the first merge, of those that it does not store as plain ones."""
    if host.stored is None:
        return {}
    found = {place.name: before for place, before in host.stored.items() if place.name == "bias"}
    return {**found, "weight": dense_from(host.base, host.stored).float()}


def encoded(item: Merged) -> Merged:
    """`item`, with the weight as the layer stores it."""
    backend, layer = backend_of(item.host.base), item.host.base
    if backend is None:
        return item
    tensors, stored, loss = dict(item.tensors), {}, None
    if "weight" in tensors:
        weight = tensors.pop("weight")
        stored = backend.encode(layer, weight)
        loss = StorageLoss.between(item.host.place, backend.name, weight, dense_from(layer, stored))
    if backend.bias_place is not None and "bias" in tensors:
        stored[backend.bias_place] = tensors.pop("bias")
    return item._replace(tensors=tensors, stored=stored, loss=loss)
