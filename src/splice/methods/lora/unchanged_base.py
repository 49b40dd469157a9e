"""LoRA that began at a part of the base weight, written as LoRA for the unchanged base (PiSSA, OLoRA, CorDA, LoRA-GA).

With A0 and B0 the factors right after the initialisation, `s (B A - B0 A0) = s [B, -B0] [A; A0]`: twice the rank, and nothing
is taken out of the base any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from splice.checkpoint.types import PeftType
from splice.config import copy_config
from splice.errors import warn
from splice.kinds.adapters import Adapters, layers_of
from splice.kinds.layer import AdapterLayer
from splice.methods.lora.config import LoraConfig

_BASE_CHANGING = ("pissa", "corda", "olora", "lora_ga")


def for_unchanged_base(
    config: LoraConfig, tensors: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor], place: str
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The config and the tensors of the plain adapter; arguments as `UnchangedBase` says.

    Raises:
        ValueError: it is not LoRA, its scales cannot be kept while ranks double, or `before` lacks a tensor of it.
    """
    return _plain_config(config), _plain_tensors(tensors, before, place)


def subtract_mutated_init(
    adapters: Adapters, output_state_dict: Mapping[str, torch.Tensor], adapter_name: str, kwargs: object = None
) -> dict[str, torch.Tensor]:
    """The tensors of the plain adapter, of twice the rank.

    Args:
        adapters: found on the model.
        output_state_dict: those of the trained adapter, by their keys.
        adapter_name: the adapter on the model that is as the trained one was right after its initialisation.
        kwargs: accepted for compatibility: the tensors of `adapter_name` are those on the model.

    Raises:
        ValueError: there is no such adapter, or it lacks a tensor of the trained one.
    """
    if adapter_name not in adapters.placed:
        raise ValueError(f"Adapter {adapter_name!r} not found; there are {list(adapters.placed)}.")
    layers = layers_of(adapters, [adapter_name], AdapterLayer)
    before = {
        layer.names.key(path, suffix): tensor.detach()
        for path, layer in layers.items()
        for suffix, tensor in layer.named_slots()
    }
    return _plain_tensors(output_state_dict, before, f"the adapter {adapter_name!r}")


def _plain_config(config: LoraConfig) -> LoraConfig:
    if config.method is not PeftType.LORA:
        raise ValueError(
            f"`path_initial_model_for_weight_conversion` is for LoRA, whose initialisations may change the base; this is "
            f"{config.peft_type}."
        )
    init = config.init_lora_weights
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` is not supported with `use_rslora` and rank_pattern or "
            "alpha_pattern: ranks that double would change the scales."
        )
    if init is not True and not (isinstance(init, str) and init.startswith(_BASE_CHANGING)):
        use = f"has no use with init_lora_weights={init!r}, which leaves the base as it is"
        warn(f"`path_initial_model_for_weight_conversion` {use}.")
    return copy_config(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2),
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: 2 * alpha for key, alpha in config.alpha_pattern.items()},
    )


def _plain_tensors(
    tensors: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor], place: str
) -> dict[str, torch.Tensor]:
    factors = {name for name in tensors if _is_a(name) or _is_b(name)}
    missing = sorted(factors - before.keys())
    if missing:
        raise ValueError(f"{place} lacks {missing[0]}, so it is not this adapter as it was initialised.")
    result = dict(tensors)
    for name in factors:
        old = before[name].to(tensors[name])
        result[name] = torch.cat([tensors[name], old]) if _is_a(name) else torch.cat([tensors[name], -old], dim=1)
    return result


def _is_a(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_embedding_A"))


def _is_b(name: str) -> bool:
    return name.endswith((".lora_B.weight", ".lora_embedding_B"))
