"""Adapters of other methods as LoRA: the update of each weight, decomposed.

With the update D = U S V^T (out, in) of a layer, LoRA of rank k and scale 1 comes nearest to it with B = U_k S_k and
A = V_k^T (Eckart and Young, 1936). It can be done to every method whose layers add such an update, the same for any input.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from splice.base.bare import walk_bare
from splice.base.dense import device_of
from splice.base.layers import LayerKind, kind_of
from splice.base.offload import at_hand
from splice.base.weight_access import weight_shape
from splice.checkpoint.keys import PREFIX
from splice.checkpoint.writing import write_checkpoint
from splice.config import PeftConfig, TargetRule
from splice.discovery import public
from splice.errors import counted
from splice.kinds.adapters import Adapters, adapters_on, layers_of
from splice.kinds.effect import Action
from splice.kinds.layer import AdapterLayer
from splice.kinds.module_copy import WholeModule
from splice.kinds.registry import register_question
from splice.kinds.shared import SharedTensors
from splice.kinds.targets import select
from splice.methods.lora.config import LoraConfig

_LINEAR = (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR)
# (update, rank) -> A and B.
Decompose = Callable[[torch.Tensor, float], "tuple[torch.Tensor, torch.Tensor]"]


def supports_lora_conversion(adapters: Adapters, adapter_name: str = "default") -> bool:
    """Whether the adapter can be converted to LoRA: all that it does is to add updates to the weights of linear layers.

    Raises:
        ValueError: there is no such adapter.
    """
    _check_known(adapters, adapter_name)
    layers = _layers(adapters, adapter_name)
    return any(not isinstance(layer, WholeModule) for layer in layers.values()) and not _in_the_way(layers)


register_question("supports_lora_conversion", supports_lora_conversion)


@public
@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """An adapter of another method as LoRA of scale 1; the model stays as it is.

    Args:
        model: a PeftModel, or a network that carries adapters (then names have no `base_model.model.`).
        rank: that of each layer. A float between 0 and 1: for each layer the smallest rank with this share of the squared
            singular values of its update.
        adapter_name: the adapter.
        progressbar: whether to show one.
        compile_kwargs: options of `torch.compile`, which then compiles the decomposition; None not to.

    Returns:
        The config and the tensors, under their names in a checkpoint.

    Raises:
        ValueError: there is no such adapter, it trains biases, or the rank is not possible.
        TypeError: what it does is more than to add updates to the weights of linear layers; the message names a layer.
    """
    adapters = adapters_on(model)
    if adapters is None:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    _check_known(adapters, adapter_name)
    _check_rank(rank)
    config, layers = adapters.peft_config[adapter_name], _layers(adapters, adapter_name)
    _check_convertible(config, layers)
    decompose: Decompose = _decomposed
    if compile_kwargs is not None:
        decompose = cast(Decompose, torch.compile(_decomposed, **compile_kwargs))
    front = PREFIX if adapters.model is not model else ""
    ranks: dict[str, int] = {}
    tensors: dict[str, torch.Tensor] = {}
    for path, layer in _with_progress(layers, progressbar):
        if isinstance(layer, WholeModule):
            stored = layer.file_form.to_file(layer, dict(layer.named_slots()))
            own = {layer.names.key(path, suffix): tensor for suffix, tensor in stored}
            tensors.update({front + key.removeprefix(PREFIX): tensor.detach().clone() for key, tensor in own.items()})
            continue
        update = _update(layer, path)
        if not isinstance(rank, float) and rank > min(update.shape):
            raise ValueError(
                f"The chosen rank {rank} is larger than the weight shape ({min(update.shape)}) of {path}, please choose a "
                "lower rank."
            )
        a, b = decompose(update, rank)
        ranks[path] = len(a)
        if len(a):
            tensors[f"{front}{path}.lora_A.weight"], tensors[f"{front}{path}.lora_B.weight"] = a, b
    by_share = isinstance(rank, float)
    saved = _saved(config.target_rule().modules_to_save, layers)
    return config_in_place_of(config, adapters.model, ranks, 1 if by_share else int(rank), by_share, saved), tensors


@public
def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter of another method into the folder `path` as LoRA; the other arguments as in `convert_to_lora`.

    Raises:
        As `convert_to_lora`, before anything is written.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    named = {name if name.startswith(PREFIX) else PREFIX + name: tensor for name, tensor in tensors.items()}
    write_checkpoint(Path(path), named, config.to_json(config.auto_mapping), safe_serialization=True)


def _layers(adapters: Adapters, name: str) -> dict[str, AdapterLayer]:
    """The adapter's layers by path, without what only holds the tensors that they share."""
    layers = layers_of(adapters, [name], AdapterLayer)
    return {path: layer for path, layer in layers.items() if not isinstance(layer, SharedTensors)}


def _check_known(adapters: Adapters, name: str) -> None:
    if name not in adapters.peft_config:
        raise ValueError(f"Adapter {name!r} not found; there are {list(adapters.peft_config)}.")


def _check_rank(rank: float) -> None:
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ValueError(
                f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
            )
    elif rank < 1:
        raise ValueError(f"Passing a rank of {rank} doesn't make sense, please pass a valid value.")


def _check_convertible(config: PeftConfig, layers: Mapping[str, AdapterLayer]) -> None:
    if config.trained_biases() != "none":
        raise ValueError(
            f"The adapter's config sets bias={config.trained_biases()}, this is not supported right now: LoRA of the weights "
            "alone would lose the biases."
        )
    found = _in_the_way(layers)
    if found:
        path, why = next(iter(found.items()))
        more = f" and on {counted(len(found) - 1, 'other layer', 'other layers')}" if len(found) > 1 else ""
        raise TypeError(f"Some module types on this model do not support LoRA conversion: {why} on {path!r}{more}.")
    if all(isinstance(layer, WholeModule) for layer in layers.values()):
        raise TypeError("Could not detect any layer that supports LoRA conversion.")


def _in_the_way(layers: Mapping[str, AdapterLayer]) -> dict[str, str]:
    """Path -> what is there that plain LoRA cannot do."""
    found = {}
    for path, layer in layers.items():
        if isinstance(layer, WholeModule):
            continue
        why = _why_not(layer)
        if why:
            found[path] = f"{type(layer).__name__}, which {why},"
    return found


def _why_not(layer: AdapterLayer) -> str:
    if kind_of(layer.base) not in _LINEAR:
        return f"is on a {kind_of(layer.base) or 'layer of another kind'}"
    if layer.action is not Action.ADDS or layer.shows:
        return "does more than to add something that the input alone decides"
    if not layer.mergeable or not layer.linear_layout or not layer.merges_exactly:
        return "changes no weight"
    if layer.leaders or layer.own_config is not None:
        return "shares its tensors with another layer"
    if layer.delta_bias() is not None:
        return "adds to the bias as well"
    return ""


def _update(layer: AdapterLayer, path: str) -> torch.Tensor:
    """What the layer adds to the weight, (out, in), in float32 at least."""
    # Additive layers need nothing of the weight but its shape, so one that cannot be read does as well.
    # Others have it read where it is kept.
    like = torch.zeros(weight_shape(layer.base), device=device_of(layer.base))
    with at_hand([layer.base]):
        found = layer.deltas({"weight": like}).get("weight")
    if found is None:
        what = f"{type(layer).__name__} on {path!r}"
        raise TypeError(f"Some module types on this model do not support LoRA conversion: {what}.")
    return found.detach().to(torch.promote_types(found.dtype, torch.float32))


def _decomposed(update: torch.Tensor, rank: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A (k, in) and B (out, k)."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    k = int(rank)
    if isinstance(rank, float):
        energy = s.double().square().cumsum(0)
        k = int((energy < rank * energy[-1]).sum()) + 1 if energy[-1] > 0 else 1
        k = min(k, len(s))
    return vh[:k].contiguous(), (u[:, :k] * s[:k]).contiguous()


def _with_progress(layers: Mapping[str, AdapterLayer], progressbar: bool) -> Iterable[tuple[str, AdapterLayer]]:
    if not progressbar:
        return layers.items()
    from tqdm import tqdm

    return cast("Iterable[tuple[str, AdapterLayer]]", tqdm(layers.items(), desc="Converting", unit="layer"))


def config_in_place_of(
    config: PeftConfig,
    network: nn.Module,
    ranks: Mapping[str, int],
    common: int,
    says_all: bool,
    saved: list[str] | None,
) -> LoraConfig:
    """The config of a LoRA of scale 1 that takes the place of an adapter with this `config`.

    Args:
        config: of the adapter; its names for layers are kept where they say it all.
        network: that it is on.
        ranks: of the layers that the LoRA is on, by path.
        common: the rank that needs no saying.
        says_all: whether the config is to name the rank of every layer none the less.
        saved: modules that are saved whole.
    """
    rule = config.target_rule()
    as_named = TargetRule(rule.target_modules, rule.exclude_modules, modules_to_save=rule.modules_to_save)
    targets, excluded = rule.target_modules, rule.exclude_modules
    if not targets or set(select(as_named, walk_bare(network))) != set(ranks):
        targets, excluded = set(ranks), None
    if not isinstance(targets, str):
        targets = set(targets)
    says_all = says_all or isinstance(targets, str)
    patterns = {path: found for path, found in ranks.items() if says_all or found != common}
    return LoraConfig(
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        r=common,
        lora_alpha=common,
        target_modules=targets,
        exclude_modules=excluded if isinstance(excluded, str) else set(excluded or ()),
        modules_to_save=saved,
        rank_pattern=dict(patterns),
        alpha_pattern=dict(patterns),
    )


def _saved(named: list[str] | None, layers: Mapping[str, AdapterLayer]) -> list[str] | None:
    """Modules that are saved whole: those that the config names, or a task's heads."""
    copies = [path for path, layer in layers.items() if isinstance(layer, WholeModule)]
    return named or copies or None
