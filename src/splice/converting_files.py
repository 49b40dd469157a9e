"""An adapter's files as those of another method, for programs that take only that one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from splice.base.dense import in_linear_layout
from splice.base.offload import at_hand
from splice.base.weight_access import dense_weight, weight_shape
from splice.checkpoint.format import CONFIG_NAME
from splice.checkpoint.writing import write_checkpoint
from splice.errors import PeftError, UnsupportedFeatureError
from splice.kinds.adapters import layers_of
from splice.kinds.approximation import Approximated, Source, Update, Wanted
from splice.kinds.effect import Action
from splice.kinds.host import Host
from splice.kinds.layer import AdapterLayer
from splice.kinds.module_copy import WholeModule
from splice.kinds.registry import all_methods
from splice.kinds.weight_delta import WeightUpdate
from splice.loading.on_disk.base_folder import BaseFolder, read_base_folder
from splice.loading.on_disk.changes import changes_of
from splice.merging_files import base_for, local_base
from splice.surgery.merging import ToMerge
from splice.tasks import PeftModel

_NAME = "default"
# Where nobody says how near the new adapter is to come.
ERROR = 0.01


class Converted(NamedTuple):
    """What a conversion has written."""

    # The folder of the new adapter.
    folder: Path
    # Its layers, without their tensors, in the order of the base.
    layers: tuple[Approximated, ...]

    @property
    def largest_error(self) -> float:
        """The largest relative error of a layer."""
        return max((layer.error for layer in self.layers), default=0.0)


def convert_files(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: str | None = None,
    rank: int | None = None,
    error: float | None = None,
    base_revision: str | None = None,
    class_name: str | None = None,
    trust_remote_code: bool = False,
    advance: Callable[[int, int], object] | None = None,
    **options: Any,
) -> Converted:
    """Write an adapter as one of another method that comes as near to it as that can.

    The base is never loaded: a layer's weight is read only where the update depends on it.

    Args:
        adapter: its folder, or its id on the Hub.
        base: folder of the base model, or its id on the Hub; a folder with a config alone where no weight is needed.
        out: the folder to be made.
        method: `peft_type` of the new adapter; None for the only one that can take another's place.
        rank: of every layer.
        error: in place of a rank, the largest error of a layer's update relative to its norm (Frobenius); 0.01 where
            neither is given.
        base_revision: of the base on the Hub.
        class_name: of a class of transformers to make the base with; None for what the adapter and the config say.
        trust_remote_code: run code that lies in the base's folder.
        advance: told how many layers of how many are done.
        **options: of `PeftModel.from_pretrained`.

    Returns:
        What was written, with the error of each layer.

    Raises:
        FileExistsError: `out` holds an adapter already.
        NotImplementedError: the adapter changes no weights.
        UnsupportedFeatureError: it changes more than weights, or layers that the new method cannot be put on; or the base's
            weights are needed and not there.
        PeftError: there is no method of this name that can do it; both rank and error are given, or neither makes sense.
    """
    wanted = _wanted(rank, error)
    able = {name.value: each.approximation for name, each in all_methods().items() if each.approximation is not None}
    approximation = next(iter(able.values())) if method is None and len(able) == 1 else able.get(method or "")
    if approximation is None:
        raise PeftError(f"nothing can be converted to {method!r}; it can be to {', '.join(able)}")
    if (Path(out) / CONFIG_NAME).exists():
        raise FileExistsError(f"{out} holds an adapter already, and nothing there is overwritten")
    folder = read_base_folder(local_base(base, base_revision), may_lack_weights=True)
    # In float32, whatever the files hold: what an update is, is the difference of two weights.
    stored = base_for(folder, adapter, torch.float32, class_name, trust_remote_code, options)
    model = PeftModel.from_pretrained(stored.network, adapter, _NAME, **options)
    source = _source(model, folder)
    layers: dict[str, Approximated] = {}
    tensors: dict[str, torch.Tensor] = dict(_copied(source.copies))
    for layer in approximation.layers(source, wanted):
        layers[layer.path] = layer._replace(tensors={})
        tensors.update(layer.tensors)
        if advance is not None:
            advance(len(layers), len(source.updates))
    if not any(layer.rank for layer in layers.values()):
        raise UnsupportedFeatureError("the adapter adds zeros to every layer: there is nothing to convert")
    config = approximation.config(source, layers)
    write_checkpoint(Path(out), tensors, config.to_json(config.auto_mapping), safe_serialization=True)
    return Converted(Path(out), tuple(layers.values()))


def _wanted(rank: int | None, error: float | None) -> Wanted:
    if rank is not None and error is not None:
        raise PeftError("give a rank or an error, not both: the one follows from the other")
    if rank is not None and rank < 1:
        raise PeftError(f"a rank is at least 1, and got {rank}")
    if error is not None and not 0 < error < 1:
        raise PeftError(f"an error is between 0 and 1 (0.01 is one hundredth of the update), and got {error}")
    return Wanted(rank, ERROR if rank is None and error is None else error)


def _source(model: PeftModel, folder: BaseFolder) -> Source:
    tuner = model.base_model
    hosts, config = tuner.hosts, tuner.peft_config[_NAME]
    if config.trained_biases() != "none":
        raise UnsupportedFeatureError(
            f"the adapter trains biases too (bias={config.trained_biases()!r}), which would be lost: it cannot be converted"
        )
    changes = changes_of(hosts, [_NAME], safe_merge=False)
    others = [name for name in changes.by_layer if name.rpartition(".")[2] != "weight"]
    if others:
        raise UnsupportedFeatureError(
            f"the adapter changes {others[0]!r} too, and not weights alone: it cannot be converted"
        )
    updates = {path: _update(hosts[path], change, folder) for path, change in changes.layers.items()}
    copies = {path: layer for path, layer in layers_of(tuner, [_NAME], WholeModule).items() if path not in updates}
    if not updates:
        raise UnsupportedFeatureError("the adapter changes no weight of a layer: there is nothing to convert")
    return Source(tuner.model, config, updates, copies)


def _update(host: Host, change: ToMerge, folder: BaseFolder) -> Update:
    layer = host.layers[_NAME]
    depends = layer.reads_weight or isinstance(layer, WeightUpdate)
    if layer.action is Action.ADDS and not depends and layer.linear_layout and not layer.shows:
        return Update(host.base, partial(_alone, layer))
    if not folder.shards:
        raise UnsupportedFeatureError(
            f"{host.place}: what {type(layer).__name__} does depends on the base's weights, and {folder.path} holds none"
        )
    return Update(host.base, partial(_difference, host, change))


@torch.no_grad()
def _alone(layer: AdapterLayer) -> torch.Tensor:
    """An update that depends on nothing of the base but its shape."""
    return layer.deltas({"weight": torch.zeros(weight_shape(layer.base))})["weight"].detach()


@torch.no_grad()
def _difference(host: Host, change: ToMerge) -> torch.Tensor:
    after = change.work_out()["weight"]
    with at_hand([host.base]):
        update = after - dense_weight(host.base)
    return in_linear_layout(host.base, update)


def _copied(copies: Mapping[str, WholeModule]) -> dict[str, torch.Tensor]:
    found = {}
    for path, layer in copies.items():
        for suffix, tensor in layer.file_form.to_file(layer, dict(layer.named_slots())):
            found[layer.names.key(path, suffix)] = tensor.detach()
    return found
