"""LoftQ beside a base that is quantised already: A and B are made to make up for what quantising it has lost.

Li et al., arXiv 2310.08659, one round of algorithm 1 with the quantised weight that is there: A and B become the best
approximation of rank r of `W - Q`, with W from a checkpoint of the base in full precision and Q what the layer computes with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from splice.base.foreign_models import name_or_path
from splice.base.weight_access import check_readable, dense_weight, is_plain
from splice.checkpoint.download import download
from splice.checkpoint.tensors import Weights, open_weights
from splice.discovery import public
from splice.kinds.adapters import Adapters, adapters_on
from splice.methods.lora.layers import OnLinear
from splice.methods.lora.loftq import decomposed

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class _Layer(NamedTuple):
    """One layer whose factors are replaced."""

    # Its path in the base model.
    path: str
    # The adapter layer.
    layer: OnLinear
    # The file with the full weight.
    weights: Weights
    # Its name there.
    name: str


@public
@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Give the LoRA layers on quantised weights A and B that come nearest to what quantising has lost, in place.

    The scale of the adapter counts: with s, A and B, the weight is `Q + s B A`, as near to the full one as rank r comes. The
    reference leaves it out.

    Args:
        peft_model: with a new LoRA adapter on a quantised base.
        model_path: the full weights, in safetensors: a file, or a folder with one or with an index. None for those that the
            base was loaded from, on disk or in the Hub's cache.
        adapter_name: of the adapter.
        callback: asked after each layer, with the model and the layer's path, whether to keep the new values; otherwise the
            layer gets the old ones back.

    Raises:
        ValueError: there is no such adapter, it has no LoRA layers on quantised weights, or the full weights of a layer are
            not there or of another shape. Nothing has changed then.
        FileNotFoundError: there are no full weights.
    """
    adapters = adapters_on(peft_model)
    if adapters is None:
        raise ValueError(f"a {type(peft_model).__name__} without adapters has no weights to replace")
    for path, layer, weights, name in list(_layers(adapters, adapter_name, model_path)):
        (full,) = weights.read([name])
        lost = full.float() - dense_weight(layer.base).to(full.device).float()
        a, b = decomposed(lost / float(layer.scale), layer.r)
        before = layer.a.clone(), layer.b.clone()
        layer.a.copy_(a)
        layer.b.copy_(b)
        if callback is not None and not callback(peft_model, path):
            layer.a.copy_(before[0])
            layer.b.copy_(before[1])


def _layers(adapters: Adapters, adapter_name: str, model_path: str | os.PathLike[str] | None) -> Iterator[_Layer]:
    if adapter_name not in adapters.peft_config:
        raise ValueError(f"Adapter {adapter_name} not found; there are {list(adapters.peft_config)}.")
    placed = {
        path: layer
        for path, layer in adapters.placed[adapter_name].items()
        if isinstance(layer, OnLinear) and not is_plain(layer.base)
    }
    if not placed:
        raise ValueError(
            f"No LoRA layer of adapter {adapter_name!r} is on a quantised weight: there is nothing to make up for."
        )
    files = _files(model_path, adapters.model)
    for path, layer in placed.items():
        check_readable(layer.base, path, "LoftQ")
        name = f"{path}.weight"
        weights = files(name)
        if weights is None or name not in weights.entries:
            raise ValueError(
                f"{path}: the full weights have no {name!r}. Pass those of this very model as `model_path`."
            )
        shape, wanted = tuple(weights.entries[name].shape), tuple(dense_weight(layer.base).shape)
        if shape != wanted:
            raise ValueError(
                f"{path}: its full weight is {list(shape)}, and the layer's is {list(wanted)}: another model's"
            )
        yield _Layer(path, layer, weights, name)


def _files(model_path: str | os.PathLike[str] | None, network: nn.Module) -> Callable[[str], Weights | None]:
    """Finds the file that has a tensor of this name; None for none."""
    place = os.fspath(model_path) if model_path is not None else name_or_path(network)
    if not place:
        raise FileNotFoundError("the base does not say what it was loaded from: pass its full weights as `model_path`")
    index = _find(place, _INDEX) if not Path(place).is_file() else None
    opened: dict[str, Weights] = {}
    if index is None:
        path = Path(place) if Path(place).is_file() else _find(place, _FILE)
        if path is None:
            raise FileNotFoundError(f"there is neither {_FILE} nor {_INDEX} at {place}, nor in the Hub's cache")
        single = open_weights(path)
        return lambda name: single
    where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]

    def find(name: str) -> Weights | None:
        file = where.get(name)
        if file is not None and file not in opened:
            shard = _find(place, file)
            if shard is None:
                raise FileNotFoundError(f"{file}, which {index} names, is not there")
            opened[file] = open_weights(shard)
        return None if file is None else opened[file]

    return find


def _find(place: str, name: str) -> Path | None:
    if Path(place).is_dir():
        path = Path(place, name)
        return path if path.exists() else None
    return download(place, name, {"local_files_only": True}, None).path
