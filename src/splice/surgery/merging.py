"""Adding adapters to the base weights, and giving the base weights back.

A merged layer holds a new parameter; the one it had is kept and put back, so unmerging is exact and costs nothing. A
parameter that is shared with another module (tied embeddings) is left alone there for the same reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from splice.base.dense import added, in_linear_layout
from splice.errors import PeftWarning
from splice.kinds.layer import AdapterLayer
from splice.surgery.adapted import Adapted, detach, first_conflict, in_order

if TYPE_CHECKING:
    from splice.surgery.tuner import Tuner


@dataclass(frozen=True)
class Merged:
    """The new tensors of one layer, worked out and not yet in it."""

    layer: Adapted
    names: list[str]
    tensors: dict[str, torch.Tensor]


def merge(tuner: Tuner, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Merge the adapters (default: the active ones) on every layer that has them.

    Raises:
        TypeError: `adapter_names` is a string.
        NotImplementedError: an adapter cannot be merged on one of its layers; no layer has been changed.
        ValueError: with `safe_merge`, a merged weight would not be finite; no layer has been changed.
    """
    names = adapters_to_merge(tuner, adapter_names)
    layers = _layers_with(tuner, names)
    check_mergeable(layers, names)
    ties = _ties(tuner, layers, names)
    # With `safe_merge` every layer is worked out before the first one is changed.
    worked_out = (merged_tensors(layer, names, safe_merge) for layer in layers if layer not in ties)
    for item in list(worked_out) if safe_merge else worked_out:
        put(item)
    for layer, leader in ties.items():
        put(_as_leader(layer, leader, names))
    for name in names:  # also those whose layers have nothing to merge
        tuner.selection.merged.setdefault(name, 0)


def merge_layer(layer: Adapted, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """`merge` on one layer alone."""
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}")
    host = layer.splice_host
    asked = host.selection.active if adapter_names is None else adapter_names
    names = [name for name in asked if name in host.layers and name not in host.merged]
    if host.merged:
        warnings.warn(f"Already merged adapters: {host.merged}; merging {names} in addition.", stacklevel=4)
    check_mergeable([layer], names)
    put(merged_tensors(layer, names, safe_merge))


def adapters_to_merge(tuner: Tuner, adapter_names: list[str] | None) -> list[str]:
    """The adapters that a merge still has to add."""
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}")
    asked = tuner.active_adapters if adapter_names is None else adapter_names
    already = tuner.merged
    names = [name for name in asked if name in tuner.peft_config and name not in already]
    if already:
        new = f"; merging {names} in addition" if names else "; nothing to do"
        warnings.warn(f"Already merged adapters: {already}{new}.", stacklevel=4)
    return names


def _layers_with(tuner: Tuner, names: Iterable[str]) -> list[Adapted]:
    return [layer for layer in tuner.adapted.values() if any(name in layer.splice_host.layers for name in names)]


def _ties(tuner: Tuner, layers: Iterable[Adapted], names: Iterable[str]) -> dict[Adapted, Adapted]:
    """Layers that share a weight with another one, and keep sharing it: all that is merged there is shared too."""
    found: dict[Adapted, Adapted] = {}
    for layer in layers:
        present = [layer.splice_host.layers[n] for n in names if n in layer.splice_host.layers]
        paths = {adapter.leader for adapter in present}
        leader = tuner.adapted.get(paths.pop()) if len(paths) == 1 else None
        if leader is None or any(adapter.stays_merged for adapter in present):
            continue
        same = set(leader.splice_host.layers).intersection(names) == set(layer.splice_host.layers).intersection(names)
        if same and _weight(leader) is _weight(layer):
            found[layer] = leader
    return found


def _weight(layer: Adapted) -> nn.Parameter | None:
    return cast(nn.Module, layer)._parameters.get("weight")


def _as_leader(layer: Adapted, leader: Adapted, names: Iterable[str]) -> Merged:
    weight = _weight(leader)
    assert weight is not None
    return Merged(layer, [name for name in names if name in layer.splice_host.layers], {"weight": weight})


def check_mergeable(layers: Iterable[Adapted], names: Iterable[str]) -> None:
    """Raise for what cannot be merged, while nothing has been changed yet.

    Raises:
        NotImplementedError: an update is no change of the layer's weight.
        RuntimeError: an update has a bias and the base layer has none.
        ValueError: two adapters put different things in the place of the same tensors.
    """
    names = list(names)
    for layer in layers:
        host = layer.splice_host
        clash = first_conflict(host.layers, [*host.merged, *names])
        if clash is not None:
            raise ValueError(f"{host.path}: adapters {clash[0]!r} and {clash[1]!r} cannot both be merged: {clash[2]}.")
        _check_reaches_output(layer, [*host.merged, *names])
        for name in names:
            adapter = host.layers.get(name)
            if adapter is None:
                continue
            what = f"{host.path}: adapter {name!r}"
            if not adapter.mergeable:
                raise NotImplementedError(f"{what} cannot be merged: its update is no change of the layer's weight")
            if not adapter.merges_exactly:
                warnings.warn(
                    f"{what} computes something on this layer that no weight does: merged, the output is another one.",
                    PeftWarning,
                    stacklevel=5,
                )
            if any(p is not None and p.is_meta for p in layer._parameters.values()):
                raise NotImplementedError(f"{what} cannot be merged while the layer's weights are offloaded")
            lacking = [n for n in adapter.changed_names if layer._parameters.get(n) is None]
            if lacking:
                raise RuntimeError(f"{what} changes the {lacking[0]}, and the base layer has none to merge it into")


def _check_reaches_output(layer: Adapted, names: list[str]) -> None:
    """What stands around a copy of the whole layer cannot go into the base's weight: the copy does not read that."""
    host = layer.splice_host
    present = in_order(host.layers, names)
    whole = [host.layers[name].stays_merged for name in present]
    if True in whole and not whole[-1]:
        raise NotImplementedError(
            f"{host.path}: adapter {present[-1]!r} cannot be merged together with {present[whole.index(True)]!r}, which "
            "uses a copy of the whole layer in its place. Merge one of them, or load them in the other order."
        )


@torch.no_grad()
def merged_tensors(layer: Adapted, names: Iterable[str], safe: bool) -> Merged:
    """The base tensors of `layer` with the adapters in them, one after the other."""
    host = layer.splice_host
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
        tensors.update(_with_adapter(layer, adapter, tensors))
        if safe:
            _check_finite(tensors, host.path, name)
    return Merged(layer, [n for n in new if not host.layers[n].stays_merged], tensors)


def _with_adapter(layer: Adapted, adapter: AdapterLayer, so_far: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
    layer = cast(Any, item.layer)
    host = item.layer.splice_host
    for name, tensor in item.tensors.items():
        old = layer._parameters[name]
        host.originals.setdefault(name, old)
        new = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=old.requires_grad)
        layer._parameters[name] = new
    host.merged.extend(item.names)
    counts = host.selection.root.merged
    for name in item.names:
        counts[name] = counts.get(name, 0) + 1


def unmerge(tuner: Tuner) -> None:
    """Put back the parameters that merging replaced: the same objects, with the same bytes."""
    if not tuner.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
    for layer in tuner.adapted.values():
        unmerge_layer(layer)
    tuner.selection.merged.clear()


def unmerge_layer(layer: Adapted) -> None:
    """Put back the parameters that merging replaced on one layer."""
    host = layer.splice_host
    cast(Any, layer)._parameters.update(host.originals)
    host.originals.clear()
    counts = host.selection.root.merged
    for name in host.merged:
        counts[name] -= 1
        if not counts[name]:
            del counts[name]
    host.merged.clear()


def merge_and_unload(tuner: Tuner, progressbar: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
    """Merge, then take every adapter off. Merged layers keep their new weights."""
    names = adapters_to_merge(tuner, adapter_names)
    layers = _layers_with(tuner, names)
    check_mergeable(layers, names)
    ties = _ties(tuner, layers, names)
    own = [layer for layer in layers if layer not in ties]
    worked_out = (merged_tensors(layer, names, safe_merge) for layer in _with_progress(own, progressbar))
    for item in list(worked_out) if safe_merge else worked_out:
        put(item)
        # There is no way back from here, so the old weight's memory is given back layer by layer.
        item.layer.splice_host.originals.clear()
    for layer, leader in ties.items():
        put(_as_leader(layer, leader, names))
    for layer in tuner.adapted.values():
        layer.splice_host.originals.clear()
    network = _take_off(tuner, names or tuner.active_adapters, keep_layers=True)
    _note_untied(network)
    return network


def _with_progress(layers: list[Adapted], progressbar: bool) -> Iterable[Adapted]:
    if not progressbar:
        return layers
    from tqdm import tqdm

    return cast(Iterable[Adapted], tqdm(layers, desc="Merging", unit="layer"))


def unload(tuner: Tuner) -> nn.Module:
    """Take every adapter off. The base weights are what they were before the first adapter came."""
    if tuner.merged:
        unmerge(tuner)
    return _take_off(tuner, [])


def _take_off(tuner: Tuner, keep_copies_of: list[str], keep_layers: bool = False) -> nn.Module:
    """Detach everything; copies of whole modules stay in place for the adapters named."""
    for path, layer in list(tuner.adapted.items()):
        copies = [layer.splice_host.layers[n] for n in keep_copies_of if n in layer.splice_host.layers]
        whole = next((c for c in copies if c.stays_merged), None)
        for name in list(layer.splice_host.layers):
            detach(cast(nn.Module, layer), name)
        if whole is not None:
            tuner.model.set_submodule(path, cast(Any, whole).module)
    tuner.adapted.clear()
    tuner.placed.clear()
    tuner.peft_config.clear()
    tuner.selection.merged.clear()
    tuner.selection.set([])
    tuner.restore_base(keep_layers)
    return tuner.model


def _note_untied(network: Any) -> None:
    """A merge may have given one of two tied layers a weight of its own; the model's config must not tie them again."""
    config = network.__dict__.get("config")
    if config is None or isinstance(config, dict) or not vars(config).get("tie_word_embeddings"):
        return
    inputs, outputs = network.get_input_embeddings(), network.get_output_embeddings()
    if inputs is not None and outputs is not None and inputs.weight is not outputs.weight:
        warnings.warn(
            "The embeddings are no longer tied after the merge; `tie_word_embeddings` is set to False.", stacklevel=4
        )
        config.tie_word_embeddings = False
