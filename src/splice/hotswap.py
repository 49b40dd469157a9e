"""Putting a new adapter in the place of one that is on a model, also of a compiled one, which is not compiled again."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from splice.config import PeftConfig
from splice.errors import warn
from splice.kinds.registry import method_of
from splice.loading.opening import open_checkpoint
from splice.loading.options import LoadOptions
from splice.loading.swapping import check_configs, checkpoint_in_memory, make_room, swap
from splice.surgery.tuner import tuner_of

__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Load an adapter in the place of one that is on the model. It computes what a fresh load would.

    The tensors stay the same objects, filled up with zeros where the new rank is lower. Where it is higher they become
    others, and a compiled model is compiled again; `prepare_model_for_compiled_hotswap` makes room beforehand. Layers for
    which the new adapter has nothing add nothing. The config of the adapter says afterwards what its layers hold.

    Args:
        model: a PeftModel, or a network that carries adapters; it may be compiled.
        model_name_or_path: folder of the new adapter, or its id on the Hub.
        adapter_name: the adapter that is replaced; its name stays.
        torch_device: accepted for compatibility: tensors go where those are that they replace.
        **kwargs: `subfolder`, `config` and `key_mapping` as in `PeftModel.from_pretrained`, and options of
            `huggingface_hub.hf_hub_download`.

    Raises:
        CheckpointError: (a ValueError) the new adapter cannot be found or read.
        AdapterMismatchError: (a RuntimeError) there is no such adapter, or the new one does not fit into its layers.
        ValueError: the adapter is merged, or the two are of methods or variants that cannot be exchanged.

    All of them are raised before anything changes.
    """
    config, key_mapping = kwargs.pop("config", None), kwargs.pop("key_mapping", None)
    options = LoadOptions(adapter_name, False, True, False, None, True, kwargs, time.perf_counter())
    checkpoint = open_checkpoint(model_name_or_path, config, options, key_mapping)
    swap(tuner_of(_uncompiled(model))[0], adapter_name, checkpoint)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str | None = None,
) -> None:
    """As `hotswap_adapter`, of tensors in memory.

    Args:
        model: a PeftModel, or a network that carries adapters; it may be compiled.
        state_dict: the new adapter's tensors. Their names may have `adapter_name` in them, as in the network, or not, as
            in a file.
        adapter_name: the adapter that is replaced.
        config: the new adapter's; it is not changed.
        parameter_prefix: what the names of the method's tensors begin with; as its record says, if None.

    Raises:
        As `hotswap_adapter`.
    """
    tuner, _ = tuner_of(_uncompiled(model))
    prefix = method_of(config).prefix if parameter_prefix is None else parameter_prefix
    swap(tuner, adapter_name, checkpoint_in_memory(tuner, adapter_name, state_dict, config, prefix))


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise where an adapter with the second config cannot take the place of one with the first.

    Raises:
        ValueError: their methods differ, cannot be exchanged, or fields that decide how they compute differ.
    """
    check_configs(config0, config1)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make room for adapters of higher ranks and other scales, so that swapping them in compiles nothing again.

    To be called after the first adapter is loaded and before the model is compiled. Tensors are filled up with zeros, and
    scales become tensors: the model computes the same. The adapters' configs say the new ranks, and the alphas that go
    with them.

    Args:
        model: a PeftModel, or a network that carries adapters.
        target_rank: the highest rank of all adapters to come; None leaves the ranks as they are.
        config: configs, one or by adapter name, that are to say the same; those of the model do in any case.
        check_compiled: what to do about a model that is compiled already.

    Raises:
        ValueError: there is no layer whose adapter could be swapped, an adapter has a higher rank, or the model is compiled.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got {check_compiled!r} instead."
        )
    if _is_compiled(model) and check_compiled != "ignore":
        text = "Call prepare_model_for_compiled_hotswap *before* compiling the model"
        if check_compiled == "error":
            raise ValueError(text)
        warn(text)
    tuner, _ = tuner_of(_uncompiled(model))
    if not make_room(tuner, target_rank):
        raise ValueError(
            "No adapter layers found on the model that could be swapped; call this after the first adapter is loaded."
        )
    given = config if isinstance(config, Mapping) else {next(iter(tuner.peft_config)): config}
    for name, other in given.items():
        swapping = method_of(other).swapping if other is not None else None
        if other is not None and swapping is not None and name in tuner.placed:
            vars(other).update(swapping.stated(other, tuner.placed[name]))


def _uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` wrapped."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def _is_compiled(model: nn.Module) -> bool:
    return _uncompiled(model) is not model or any(module._compiled_call_impl is not None for module in model.modules())
