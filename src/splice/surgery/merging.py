"""Adding adapters to the base weights, and giving the base weights back.

Merging changes the values of the parameters that are there, and keeps those that they had: so unmerging is exact and costs
nothing, and whoever holds a parameter sees what is merged. A parameter that another module holds too (tied embeddings)
stays as it is for that one, and a new one takes its place on the adapted layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import nn

from splice.base.added_product import added_product
from splice.base.dense import added, in_linear_layout
from splice.base.embeddings import untie_head
from splice.base.foreign_models import (
    config_field,
    input_embedding_layer,
    output_embedding_layer,
)
from splice.base.layers import LayerKind, kind_of
from splice.base.offload import at_hand
from splice.base.sharding import divide_again, whole, whole_tensors
from splice.base.weight_access import dense_tensors, is_plain
from splice.errors import PeftWarning, warn
from splice.kinds.effect import Factors
from splice.kinds.host import Host, in_order
from splice.kinds.layer import AdapterLayer
from splice.kinds.tensors import Registry
from splice.selection import Selection
from splice.surgery.encoding import before_merging, encoded
from splice.surgery.loss import MergeReport, StorageLoss, losses_of
from splice.surgery.mergeable import check_mergeable, check_order, still_to_merge, with_companions
from splice.surgery.putting import Before, Merged, check_apart, held_twice, put, take_out


def merge(
    network: nn.Module, hosts: Mapping[str, Host], selection: Selection, names: Sequence[str], safe_merge: bool
) -> MergeReport:
    """Merge these adapters on every layer that has them; where anything fails, also half-way, no layer is changed.

    Args:
        network: that the layers are in.
        hosts: of the adapted layers, by path.
        selection: of the model.
        names: of the adapters, as `adapters_to_merge` gives them.
        safe_merge: refuse values that are not finite.

    Returns:
        What was merged, and what was lost where weights are stored in few bits, of which there is a warning.

    Raises:
        NotImplementedError: an adapter cannot be merged on one of its layers.
        ValueError: merging these and not others would change the output; with `safe_merge`, a merged weight would not be
            finite.
    """
    check_order(hosts.values(), names)
    divide_again(network)
    done: list[Before] = []
    losses: list[StorageLoss | None] = []
    try:
        shared = held_twice(network)
        check_apart(hosts.values(), names, shared)
        for item in _merging(hosts, names, safe_merge, progressbar=False):
            done.append(Before.of(item))
            put(item, shared)
            losses.append(item.loss)
    except BaseException:
        for before in reversed(done):
            before.put_back()
        raise
    for name in names:  # also those whose layers have nothing to merge
        selection.merged.setdefault(name, 0)
    return _reported(names, losses)


def _reported(names: Sequence[str], losses: Sequence[StorageLoss | None]) -> MergeReport:
    report = MergeReport(tuple(names), len(losses), losses_of(losses))
    if report.losses:
        warn(
            f"{report}. `merge_and_unload(dequantize=True)` gives a dense model, where it is not.",
            PeftWarning,
        )
    return report


def merge_for_good(
    network: nn.Module, hosts: Mapping[str, Host], names: Sequence[str], safe_merge: bool, progressbar: bool
) -> MergeReport:
    """As `merge`, without a way back: the memory of each old weight is given back as soon as the new one is in place.

    Cut short in the middle without `safe_merge`, it leaves the output as it was, with some layers merged.
    """
    divide_again(network)
    shared = held_twice(network)
    check_apart(hosts.values(), names, shared)
    losses: list[StorageLoss | None] = []
    for item in _merging(hosts, names, safe_merge, progressbar):
        before = Before.of(item)
        try:
            put(item, shared)
        except BaseException:
            before.put_back()
            raise
        _forget(item.host)
        losses.append(item.loss)
    for host in hosts.values():
        _forget(host)
    return _reported(names, losses)


def _forget(host: Host) -> None:
    host.originals.clear()
    host.shelved.clear()
    host.stored = None


class ToMerge(NamedTuple):
    """A layer that a merge would change, for who wants the result elsewhere than in the model."""

    # What works out the layer's tensors after the merge.
    work_out: Callable[[], Mapping[str, torch.Tensor]]
    # Path of the layer whose weight after the merge is this one's too; its own where it shares none.
    leader: str
    # The plain product (out, in) that is added to the weight, where nothing else changes.
    product: Factors | None


def to_merge(hosts: Mapping[str, Host], names: Sequence[str], safe_merge: bool) -> dict[str, ToMerge]:
    """Path of each layer that merging these adapters would change -> what it comes to. No layer is changed.

    Raises:
        As `merge`; with `safe_merge` as a layer is worked out.
    """
    check_order(hosts.values(), names)
    concerned = [host for host in hosts.values() if still_to_merge(host, names)]
    check_mergeable(concerned, names)
    ties = _ties(hosts, concerned, names)

    def work_out(host: Host) -> Mapping[str, torch.Tensor]:
        return merged_tensors(host, names, safe_merge).tensors

    return {
        host.path: ToMerge(
            partial(work_out, ties.get(host.path, host)),
            ties.get(host.path, host).path,
            None if safe_merge or host.path in ties else _sole_product(host, names),
        )
        for host in concerned
    }


def _sole_product(host: Host, names: Iterable[str]) -> Factors | None:
    """What merging these adapters adds to the weight of a layer, where that is one plain product and nothing else changes."""
    new = still_to_merge(host, names)
    if len(new) != 1 or host.merged or not is_plain(host.base) or kind_of(host.base) is not LayerKind.LINEAR:
        return None
    adapter = host.layers[new[0]]
    changes_weight_alone = not adapter.shows and adapter.changed_names == ("weight",)
    return adapter.factors() if changes_weight_alone else None


def merge_layer(host: Host, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """`merge` on one layer alone."""
    names = left_to_merge(host, adapter_names)
    check_order([host], names)
    check_mergeable([host], names)
    network = host.network.get()
    divide_again(network)
    shared = held_twice(network)
    check_apart([host], names, shared)
    item = merged_tensors(host, names, safe_merge)
    before = Before.of(item)
    try:
        put(item, shared)
    except BaseException:
        before.put_back()
        raise
    _reported(names, [item.loss])


def left_to_merge(host: Host, adapter_names: list[str] | None) -> list[str]:
    """The adapters that a merge still has to add on this layer: of those named, or of the active ones.

    Raises:
        TypeError: `adapter_names` is a string.
    """
    names = still_to_merge(host, _named(adapter_names, host.selection.active))
    if host.merged:
        warn(_already(host.merged, names))
    return names


def _already(merged: Iterable[str], names: Sequence[str]) -> str:
    if not names:
        return f"All adapters are already merged, nothing to do: {list(merged)} are in the weights."
    return f"Already following adapters were merged: {list(merged)}. You are now additionally merging {list(names)}."


def adapters_to_merge(
    hosts: Iterable[Host], selection: Selection, known: Iterable[str], adapter_names: list[str] | None
) -> list[str]:
    """The adapters that a merge still has to add on some layer: of those named, or of the active ones.

    Raises:
        TypeError: `adapter_names` is a string.
        ValueError: an active adapter that is not among them makes something of one that is.
    """
    asked, known = _named(adapter_names, selection.active), list(known)
    names = [name for name in asked if name in known]
    if len(names) < len(asked):
        # What other libraries pass on may name adapters of other models; a typo should not give the base in silence.
        warn(f"There is no adapter {next(n for n in asked if n not in known)!r} to merge; there are {known}.")
    hosts = list(hosts)
    names = with_companions(hosts, names, selection.active)
    if not selection.merged:
        return names
    # On some layer: one that was merged alone must not keep the others from it.
    left = {name for host in hosts for name in still_to_merge(host, names)}
    names = [name for name in names if name in left or name not in selection.merged]
    warn(_already(selection.merged, names))
    return names


def _named(adapter_names: list[str] | None, active: Sequence[str]) -> Sequence[str]:
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}")
    return active if adapter_names is None else adapter_names


def _merging(hosts: Mapping[str, Host], names: Sequence[str], safe_merge: bool, progressbar: bool) -> Iterator[Merged]:
    """Work out one layer after the other; the next is asked for when the one before it has been put in place."""
    concerned = [host for host in hosts.values() if still_to_merge(host, names)]
    check_mergeable(concerned, names)
    ties = _ties(hosts, concerned, names)
    own = [host for host in concerned if host.path not in ties]
    worked_out = (merged_tensors(host, names, safe_merge) for host in _with_progress(own, progressbar))
    # With `safe_merge` every layer is worked out before the first one is changed.
    # Without, the new tensors of one layer at a time are held beside the old ones.
    yield from list(worked_out) if safe_merge else worked_out
    for host in concerned:
        if host.path in ties:
            yield _as_leader(host, ties[host.path], names)


def _with_progress(hosts: list[Host], progressbar: bool) -> Iterable[Host]:
    if not progressbar:
        return hosts
    from tqdm import tqdm

    return cast(Iterable[Host], tqdm(hosts, desc="Merging", unit="layer"))


def _ties(hosts: Mapping[str, Host], concerned: Iterable[Host], names: Iterable[str]) -> dict[str, Host]:
    """Path of a layer that shares its weight with another one, and keeps sharing it -> the host of that one.

    All that is merged on such a layer is shared too.
    """
    # By the parameter and not by the config: only layers that compute with one parameter now can go on sharing it.
    found: dict[str, Host] = {}
    for host in concerned:
        present = [host.layers[name] for name in names if name in host.layers]
        paths = {leader.path for adapter in present for leader in adapter.leaders.values()}
        leader = hosts.get(paths.pop()) if len(paths) == 1 and all(map(_shares_all, present)) else None
        if leader is None or any(adapter.stays_merged for adapter in present):
            continue
        same = set(leader.layers).intersection(names) == set(host.layers).intersection(names)
        if same and _weight(leader) is _weight(host):
            found[host.path] = leader
    return found


def _shares_all(adapter: AdapterLayer) -> bool:
    return all(suffix in adapter.leaders for suffix, _ in adapter.named_slots())


def _weight(host: Host) -> nn.Parameter | None:
    return host.base._parameters.get("weight")


def _as_leader(host: Host, leader: Host, names: Iterable[str]) -> Merged:
    weight = _weight(leader)
    assert weight is not None
    return Merged(host, still_to_merge(host, names), {"weight": weight})


def merged_tensors(host: Host, names: Iterable[str], safe: bool) -> Merged:
    """The base tensors of a layer with the adapters in them, one after the other; whole, also where they are divided."""
    # One layer at a time is gathered: methods compute with weights as a whole (norms of rows, products of blocks).
    names = list(names)
    adapters = {*names, *host.merged}
    with at_hand(_modules(host, adapters)), whole_tensors(_places(host, adapters)):
        return _merged_tensors(host, names, safe)


def _modules(host: Host, adapters: Iterable[str]) -> Iterator[nn.Module]:
    """The modules that have the tensors that a merge of these adapters on this layer computes with."""
    yield host.base
    for adapter in (host.layers[name] for name in adapters if name in host.layers):
        for layer in (adapter, *adapter.shared):
            yield from layer.holders()


def _places(host: Host, adapters: Iterable[str]) -> Iterator[tuple[Registry, str]]:
    """Where the tensors stand that a merge of these adapters on this layer computes with."""
    for name in host.base._parameters:
        yield host.base._parameters, name
    for adapter in (host.layers[name] for name in adapters if name in host.layers):
        for layer in (adapter, *adapter.shared):
            for registry, name, _ in layer.registered.values():
                yield registry, name


@torch.no_grad()
def _merged_tensors(host: Host, names: Iterable[str], safe: bool) -> Merged:
    new = still_to_merge(host, names)
    active = host.selection.current().names
    # Those that take effect now in the order in which they do, whatever the caller's: merging changes no output.
    present = in_order(host.layers, [n for n in active if n in new] if set(new) <= set(active) else new)
    tensors: dict[str, torch.Tensor] = {}
    if host.merged and (host.stored or any(host.layers[name].shows for name in present)):
        # What is shown is what the base computes with, below all others: begin with the originals again. So it is where
        # the weight was rounded when it was stored, and would be a second time.
        present = [*host.merged, *present]
        tensors = {name: whole(tensor.detach()) for name, tensor in host.originals.items()}
        tensors.update({name: shelf.read(entry) for name, (shelf, entry) in host.shelved.items()})
        tensors.update(before_merging(host))
    for name in present:
        if host.layers[name].shows:
            tensors.update(_replaced(host.base, host.layers[name], tensors))
    for name in present:
        tensors.update(_with_adapter(host.base, host.layers[name], tensors))
        if safe:
            _check_finite(tensors, host.place, name)
    return encoded(Merged(host, new, tensors))


def _current(layer: nn.Module, so_far: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**dense_tensors(layer), **so_far}


def _replaced(layer: nn.Module, adapter: AdapterLayer, so_far: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    current, result = _current(layer, so_far), {}
    if adapter.trained_bias is not None:
        result["bias"] = adapter.trained_bias.detach().clone()
    result.update(adapter.replaced({**current, **result}))
    return {name: tensor.to(current[name].dtype) for name, tensor in result.items()}


def _with_adapter(
    layer: nn.Module, adapter: AdapterLayer, so_far: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    result = {} if adapter.shows else _replaced(layer, adapter, so_far)
    current = {**_current(layer, so_far), **result}
    seen = dict(current)
    if adapter.linear_layout and "weight" in seen:
        seen["weight"] = in_linear_layout(layer, seen["weight"])
    product = _with_product(adapter, current, seen)
    if product is not None:
        return {**result, "weight": product}
    for name, delta in adapter.deltas(seen).items():
        stored = in_linear_layout(layer, delta) if name == "weight" and adapter.linear_layout else delta
        result[name] = added(current[name], stored)
    return result


def _with_product(
    adapter: AdapterLayer, current: Mapping[str, torch.Tensor], seen: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """The weight with an update that is a plain product, where that need not be there as a whole."""
    factors = adapter.factors()
    if factors is None or current.get("weight") is not seen.get("weight"):  # which is stored the other way round
        return None
    return added_product(current["weight"], factors.b, factors.a, factors.scale)


def _check_finite(tensors: dict[str, torch.Tensor], path: str, name: str) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {name} seems to be broken: it is {path} that has them."
        )


def unmerge(hosts: Iterable[Host], selection: Selection) -> None:
    """Give back the values from before the first merge, to the byte, in the dtype and on the device of today."""
    if not selection.merged:
        warn("Already unmerged. Nothing to do.")
    hosts = list(hosts)
    divide_again(hosts[0].network.get() if hosts else None)
    take_out(hosts)
    selection.merged.clear()


def unmerge_layer(host: Host) -> None:
    """`unmerge` on one layer alone."""
    divide_again(host.network.get())
    take_out([host])


def note_untied(network: nn.Module) -> None:
    """A merge may have given one of two tied layers a weight of its own; the model's config must not tie them again."""
    if not config_field(network, "tie_word_embeddings"):
        return
    inputs, outputs = input_embedding_layer(network), output_embedding_layer(network)
    if inputs is not None and outputs is not None and inputs.weight is not outputs.weight:
        warn("The embeddings are no longer tied after the merge; `tie_word_embeddings` is set to False.")
        untie_head(network)
