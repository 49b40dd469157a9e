"""Adding adapters to the base weights, and giving the base weights back.

A merged layer holds a new parameter; the one it had is kept and put back, so unmerging is exact and costs nothing. A
parameter that is shared with another module (tied embeddings) is left alone there for the same reason.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn

from splice.base.dense import added, in_linear_layout
from splice.base.foreign_models import (
    config_field,
    input_embedding_layer,
    output_embedding_layer,
    set_config_field,
)
from splice.errors import PeftWarning, warn
from splice.kinds.host import Host, first_conflict, in_order
from splice.kinds.layer import AdapterLayer
from splice.selection import Selection


class Merged(NamedTuple):
    """The new tensors of one layer, worked out and not yet in it."""

    # The layer's host.
    host: Host
    # The adapters that are in the tensors now.
    names: list[str]
    # New tensors of the base layer by name.
    tensors: dict[str, torch.Tensor]


def merge(hosts: Mapping[str, Host], selection: Selection, names: Sequence[str], safe_merge: bool) -> None:
    """Merge these adapters on every layer that has them.

    Args:
        hosts: of the adapted layers, by path.
        selection: of the model.
        names: of the adapters, as `adapters_to_merge` gives them.
        safe_merge: work out all layers before the first is changed, and refuse values that are not finite.

    Raises:
        NotImplementedError: an adapter cannot be merged on one of its layers; no layer has been changed.
        ValueError: with `safe_merge`, a merged weight would not be finite; no layer has been changed.
    """
    for _ in _merging(hosts, names, safe_merge, progressbar=False):
        pass
    for name in names:  # also those whose layers have nothing to merge
        selection.merged.setdefault(name, 0)


def merge_for_good(hosts: Mapping[str, Host], names: Sequence[str], safe_merge: bool, progressbar: bool) -> None:
    """As `merge`, without a way back: the memory of each old weight is given back as soon as the new one is in place."""
    for host in _merging(hosts, names, safe_merge, progressbar):
        host.originals.clear()
    for host in hosts.values():
        host.originals.clear()


def merge_layer(host: Host, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """`merge` on one layer alone."""
    names = [name for name in _named(adapter_names, host.selection.active) if name in host.layers]
    names = [name for name in names if name not in host.merged]
    if host.merged:
        warn(f"Already merged adapters: {host.merged}; merging {names} in addition.")
    check_mergeable([host], names)
    put(merged_tensors(host, names, safe_merge))


def adapters_to_merge(selection: Selection, known: Container[str], adapter_names: list[str] | None) -> list[str]:
    """The adapters that a merge still has to add: those named, or the active ones.

    Raises:
        TypeError: `adapter_names` is a string.
    """
    already = list(selection.merged)
    names = [n for n in _named(adapter_names, selection.active) if n in known and n not in already]
    if already:
        new = f"; merging {names} in addition" if names else "; nothing to do"
        warn(f"Already merged adapters: {already}{new}.")
    return names


def _named(adapter_names: list[str] | None, active: Sequence[str]) -> Sequence[str]:
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}")
    return active if adapter_names is None else adapter_names


def _merging(hosts: Mapping[str, Host], names: Sequence[str], safe_merge: bool, progressbar: bool) -> Iterator[Host]:
    """Merge on one layer after the other, and give each when it is done."""
    concerned = [host for host in hosts.values() if any(name in host.layers for name in names)]
    check_mergeable(concerned, names)
    ties = _ties(hosts, concerned, names)
    own = [host for host in concerned if host.path not in ties]
    worked_out = (merged_tensors(host, names, safe_merge) for host in _with_progress(own, progressbar))
    # With `safe_merge` every layer is worked out before the first one is changed.
    # Without, the new tensors of one layer at a time are held beside the old ones.
    for item in list(worked_out) if safe_merge else worked_out:
        put(item)
        yield item.host
    for host in concerned:
        if host.path in ties:
            put(_as_leader(host, ties[host.path], names))
            yield host


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
        paths = {adapter.leader for adapter in present}
        leader = hosts.get(paths.pop()) if len(paths) == 1 else None
        if leader is None or any(adapter.stays_merged for adapter in present):
            continue
        same = set(leader.layers).intersection(names) == set(host.layers).intersection(names)
        if same and _weight(leader) is _weight(host):
            found[host.path] = leader
    return found


def _weight(host: Host) -> nn.Parameter | None:
    return host.base._parameters.get("weight")


def _as_leader(host: Host, leader: Host, names: Iterable[str]) -> Merged:
    weight = _weight(leader)
    assert weight is not None
    return Merged(host, [name for name in names if name in host.layers], {"weight": weight})


def check_mergeable(hosts: Iterable[Host], names: Iterable[str]) -> None:
    """Raise for what cannot be merged, while nothing has been changed yet.

    Raises:
        NotImplementedError: an update is no change of the layer's weight.
        RuntimeError: an update has a bias and the base layer has none.
        ValueError: two adapters put different things in the place of the same tensors.
    """
    # All layers before the first is changed: what is found at the tenth must not leave nine merged.
    names = list(names)
    for host in hosts:
        clash = first_conflict(host.layers, [*host.merged, *names])
        if clash is not None:
            raise ValueError(f"{host.place}: adapters {clash[0]!r} and {clash[1]!r} cannot both be merged: {clash[2]}.")
        _check_reaches_output(host, [*host.merged, *names])
        for name in names:
            adapter = host.layers.get(name)
            if adapter is None:
                continue
            what = f"{host.place}: adapter {name!r}"
            if not adapter.mergeable:
                raise NotImplementedError(f"{what} cannot be merged: what it does is no change of weights")
            if not adapter.merges_exactly:
                warn(
                    f"{what} computes something on this layer that no weight does: merged, the output is another one.",
                    PeftWarning,
                )
            if any(p is not None and p.is_meta for p in host.base._parameters.values()):
                raise NotImplementedError(f"{what} cannot be merged while the layer's weights are offloaded")
            lacking = [n for n in adapter.changed_names if host.base._parameters.get(n) is None]
            if lacking:
                raise RuntimeError(f"{what} changes the {lacking[0]}, and the base layer has none to merge it into")


def _check_reaches_output(host: Host, names: list[str]) -> None:
    """What stands around a copy of the whole layer cannot go into the base's weight: the copy does not read that."""
    present = in_order(host.layers, names)
    whole = [host.layers[name].stays_merged for name in present]
    if True in whole and not whole[-1]:
        raise NotImplementedError(
            f"{host.place}: adapter {present[-1]!r} cannot be merged together with {present[whole.index(True)]!r}, which "
            "uses a copy of the whole layer in its place. Merge one of them, or load them in the other order."
        )


@torch.no_grad()
def merged_tensors(host: Host, names: Iterable[str], safe: bool) -> Merged:
    """The base tensors of a layer with the adapters in them, one after the other."""
    new = [name for name in names if name in host.layers]
    present, tensors = in_order(host.layers, new), {}
    if present != new or (host.merged and present and host.layers[present[0]].first_outside):
        # What the input meets first is merged last, also where it was merged before: begin with the originals again.
        present = in_order(host.layers, [*host.merged, *new])
        tensors = {name: parameter.detach() for name, parameter in host.originals.items()}
    for name in present:
        adapter = host.layers[name]
        if adapter.stays_merged:  # its copy goes on computing; `merge_and_unload` puts it in place
            continue
        tensors.update(_with_adapter(host.base, adapter, tensors))
        if safe:
            _check_finite(tensors, host.place, name)
    return Merged(host, [n for n in new if not host.layers[n].stays_merged], tensors)


def _with_adapter(layer: nn.Module, adapter: AdapterLayer, so_far: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    own = {name: tensor for name, tensor in layer._parameters.items() if tensor is not None}
    result: dict[str, torch.Tensor] = {}
    if adapter.trained_bias is not None:
        result["bias"] = adapter.trained_bias.detach().to(own["bias"].dtype).clone()
    current = {**own, **so_far, **result}
    result.update(adapter.replaced(current))
    current.update(result)
    seen = dict(current)
    if adapter.linear_layout and "weight" in seen:
        seen["weight"] = in_linear_layout(layer, seen["weight"])
    for name, delta in adapter.deltas(seen).items():
        stored = in_linear_layout(layer, delta) if name == "weight" and adapter.linear_layout else delta
        result[name] = added(current[name], stored)
    return result


def _check_finite(tensors: dict[str, torch.Tensor], path: str, name: str) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise ValueError(f"NaNs detected in the merged weights of {path}. The adapter {name!r} seems to be broken.")


def put(item: Merged) -> None:
    """Put worked-out tensors in place, keeping what they replace."""
    # A new parameter, where adding into the old one would spare its memory: then unmerging had to subtract, which rounds,
    # and a tied layer elsewhere would change as well.
    host = item.host
    registry: dict[str, nn.Parameter | None] = host.base._parameters
    for name, tensor in item.tensors.items():
        old = registry[name]
        assert old is not None
        host.originals.setdefault(name, old)
        new = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=old.requires_grad)
        registry[name] = new
    host.merged.extend(item.names)
    counts = host.selection.root.merged
    for name in item.names:
        counts[name] = counts.get(name, 0) + 1


def unmerge(hosts: Iterable[Host], selection: Selection) -> None:
    """Put back the parameters that merging replaced: the same objects, with the same bytes."""
    if not selection.merged:
        warn("Already unmerged. Nothing to do.")
    for host in hosts:
        unmerge_layer(host)
    selection.merged.clear()


def unmerge_layer(host: Host) -> None:
    """Put back the parameters that merging replaced on one layer."""
    host.base._parameters.update(host.originals)
    host.originals.clear()
    counts = host.selection.root.merged
    for name in host.merged:
        counts[name] -= 1
        if not counts[name]:
            del counts[name]
    host.merged.clear()


def note_untied(network: nn.Module) -> None:
    """A merge may have given one of two tied layers a weight of its own; the model's config must not tie them again."""
    if not config_field(network, "tie_word_embeddings"):
        return
    inputs, outputs = input_embedding_layer(network), output_embedding_layer(network)
    if inputs is not None and outputs is not None and inputs.weight is not outputs.weight:
        warn("The embeddings are no longer tied after the merge; `tie_word_embeddings` is set to False.")
        set_config_field(network, "tie_word_embeddings", False)
