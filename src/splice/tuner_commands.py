"""What programs call on a tuner (`model.base_model`) that takes more than the tuner: it is entered there by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from splice.injecting import injected
from splice.kinds.combining import Combination
from splice.loading.combining import add_weighted_adapter
from splice.surgery.tuner import COMMANDS, Tuner


def combine(
    tuner: Tuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    *options: Any,
    **named: Any,
) -> None:
    """`PeftModel.add_weighted_adapter`, with its arguments."""
    add_weighted_adapter(tuner, adapters, weights, adapter_name, Combination(combination_type, *options, **named))


def inject(
    tuner: Tuner,
    model: nn.Module,
    adapter_name: str,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Put an adapter on the network whose config was entered as `tuner.peft_config[adapter_name]`; it becomes active.

    Raises:
        KeyError: there is no such config.
        ValueError: the adapter is on the network already, `model` is another network, or the config cannot be applied.
    """
    if model is not tuner.model:
        raise ValueError("this tuner is that of another network; use `inject_adapter_in_model(config, model)`")
    if adapter_name in tuner.placed:
        raise ValueError(f"Adapter with name {adapter_name!r} is on the network already.")
    config = tuner.peft_config.pop(adapter_name)
    try:
        injected(config, model, adapter_name, low_cpu_mem_usage, state_dict, autocast_adapter_dtype)
    except BaseException:
        tuner.peft_config[adapter_name] = config
        raise


COMMANDS.update(add_weighted_adapter=combine, inject_adapter=inject)
