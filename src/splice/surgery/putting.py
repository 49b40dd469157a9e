"""The tensors of a base layer exchanged for merged ones, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from splice.base.backends.backend import Stored, moved, place_all, standing
from splice.base.bare import walk_bare
from splice.base.dense import as_now, device_of, exchange, values_of
from splice.base.offload import Shelf, shelf_of
from splice.base.sharding import is_divided
from splice.errors import UnsupportedFeatureError
from splice.kinds.host import Host, host_of
from splice.surgery.loss import StorageLoss


class Merged(NamedTuple):
    """The new tensors of one layer, worked out and not yet in it."""

    # The layer's host.
    host: Host
    # The adapters that are in the tensors and were not before.
    names: list[str]
    # New tensors of the base layer by name; a parameter where it is one that another layer has.
    tensors: dict[str, torch.Tensor]
    # The new weight as the layer stores it, where that is in another way; then it is not among the tensors.
    stored: Stored = {}
    # What storing it so has lost; None where it is stored as a plain tensor.
    loss: StorageLoss | None = None


class Before(NamedTuple):
    """One layer as it was before tensors were put in place."""

    # The layer's host.
    host: Host
    # `host.merged` as it was.
    merged: list[str]
    # `host.originals` as it was.
    originals: dict[str, torch.Tensor]
    # The parameters that change, and the values they had.
    held: dict[str, tuple[nn.Parameter, torch.Tensor]]
    # `host.stored` as it was.
    stored: Stored | None = None
    # What stood where `Merged.stored` goes.
    replaced: Stored = {}
    # `host.shelved` as it was.
    shelved: dict[str, tuple[Shelf, object]] = {}
    # Where those tensors are kept that change, and what was there.
    shelves: tuple[tuple[Shelf, object], ...] = ()

    @classmethod
    def of(cls, item: Merged) -> Before:
        """As it is now, for what `put` changes."""
        host, held = item.host, {}
        shelves = []
        for name in item.tensors:
            parameter, shelf = host.base._parameters[name], shelf_of(host.base, name)
            assert parameter is not None
            if shelf is None:
                held[name] = (parameter, values_of(parameter))
            else:
                shelves.append((shelf, shelf.entry))
        stored = None if host.stored is None else dict(host.stored)
        replaced, shelved = standing(host.base, item.stored), dict(host.shelved)
        return cls(host, list(host.merged), dict(host.originals), held, stored, replaced, shelved, tuple(shelves))

    def put_back(self) -> None:
        """Make the layer so again."""
        host = self.host
        for name, (parameter, values) in self.held.items():
            exchange(parameter, values)
            host.base._parameters[name] = parameter
        for shelf, entry in self.shelves:
            shelf.put(entry)
        host.shelved = dict(self.shelved)
        place_all(host.base, self.replaced)
        host.stored = self.stored
        _count(host, host.merged[len(self.merged) :], -1)
        host.merged[:] = self.merged
        host.originals.clear()
        host.originals.update(self.originals)


def held_twice(network: nn.Module | None) -> Collection[int] | None:
    """`id` of each parameter that more than one place of the network has; None where nobody knows."""
    if network is None:
        return None
    found = Counter[int]()
    for module in walk_bare(network).values():
        found.update(id(p) for p in module._parameters.values() if p is not None)
        host = host_of(module)
        if host is not None:  # set aside by an earlier merge, and to be put back
            found.update(id(t) for t in host.originals.values() if isinstance(t, nn.Parameter))
    return {number for number, count in found.items() if count > 1}


def check_apart(hosts: Iterable[Host], names: Iterable[str], shared: Collection[int] | None) -> None:
    """Raise where a merge would put a new parameter in the place of one that is divided among processes.

    Raises:
        UnsupportedFeatureError: whoever divides the parameter (FSDP) would put his own there again, with the old values.
    """
    names = set(names)
    for host in hosts:
        if names.isdisjoint(host.layers):
            continue
        for name, parameter in host.base._parameters.items():
            stays = shared is not None and id(parameter) not in shared and name not in host.displaced
            if not stays and is_divided(parameter):
                raise UnsupportedFeatureError(
                    f"{host.place}: its {name} is another layer's too, and is divided among processes, so nothing can be "
                    "merged into it. Merge before the model is sharded, or leave this layer out of the targets."
                )


def put(item: Merged, shared: Collection[int] | None) -> None:
    """Put worked-out tensors in place, keeping what they replace.

    Args:
        item: the tensors.
        shared: as `held_twice` gives it, before the first layer was changed.
    """
    host = item.host
    registry: dict[str, nn.Parameter | None] = host.base._parameters
    for name, tensor in item.tensors.items():
        old, shelf = registry[name], shelf_of(host.base, name)
        assert old is not None
        if shelf is not None:
            # Where the values from before are kept they stay, as the module has none between calls.
            host.shelved.setdefault(name, (shelf, shelf.entry))
            shelf.put(shelf.written(tensor))
        elif isinstance(tensor, nn.Parameter):
            host.originals.setdefault(name, old)
            registry[name] = tensor
        elif shared is None or id(old) in shared or name in host.displaced:
            # The values of this one are also another module's, or the adapter's own.
            host.originals.setdefault(name, old)
            registry[name] = nn.Parameter(tensor, requires_grad=old.requires_grad)
        else:
            host.originals.setdefault(name, exchange(old, tensor))
    if item.stored:
        # Not other values in the same parameter: what codes mean stands beside them, in objects that belong to them.
        host.stored = {**standing(host.base, item.stored), **(host.stored or {})}
        place_all(host.base, item.stored)
    host.merged.extend(item.names)
    _count(host, item.names, 1)


def take_out(hosts: Sequence[Host]) -> None:
    """Put back what merging replaced on these layers.

    Raises:
        RuntimeError: some were merged for good; nothing has been changed.
    """
    changed = [host for host in hosts if any(host.layers[name].changed_names for name in host.merged)]
    final = [host.path for host in changed if not (host.originals or host.shelved) and host.stored is None]
    if final:
        raise RuntimeError(
            f"{', '.join(map(repr, final[:5]))}: merged for good by a `merge_and_unload` that was cut short, so the weights "
            "from before are gone. Call `merge_and_unload` again to finish it, or load the base again."
        )
    for host in hosts:
        registry: dict[str, nn.Parameter | None] = host.base._parameters
        for name, before in host.originals.items():
            now = registry[name]
            assert now is not None
            # The model may have been moved, or cast, while it was merged.
            back = as_now(before.detach(), now)
            if not isinstance(before, nn.Parameter):
                exchange(now, back)
                continue
            if (before.device, before.dtype) != (now.device, now.dtype):
                exchange(before, back)
            registry[name] = before
        host.originals.clear()
        for shelf, entry in host.shelved.values():
            shelf.put(entry)
        host.shelved.clear()
        if host.stored is not None:
            place_all(host.base, moved(host.stored, device_of(host.base)))
            host.stored = None
        _count(host, host.merged, -1)
        host.merged.clear()


def _count(host: Host, names: Iterable[str], change: int) -> None:
    counts = host.selection.root.merged
    for name in names:
        counts[name] = counts.get(name, 0) + change
        if not counts[name]:
            del counts[name]
