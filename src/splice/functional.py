"""What libraries do to the adapters of a network without a PeftModel around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from splice.base.dtypes import HALVES
from splice.injecting import inject_adapter_in_model as inject_adapter_in_model
from splice.kinds.module_copy import WholeModule
from splice.kinds.slot import Role
from splice.loading.saving import get_peft_model_state_dict as get_peft_model_state_dict
from splice.loading.state import set_peft_model_state_dict as set_peft_model_state_dict
from splice.surgery.isinstance_classes import BaseTunerLayer
from splice.surgery.tuner import CONFIGS, tuner_of

# `prefix` and `layer_cls` tell the reference which modules are adapter layers. Here the tuner knows its own, whatever their
# class, and callers may go on passing both.

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: type = BaseTunerLayer
) -> None:
    """Make these adapters the active ones, and trainable unless `inference_mode`; `layer_cls` is ignored."""
    tuner_of(model)[0].set_adapter(adapter_name, inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type = BaseTunerLayer
) -> list[str] | None:
    """Take an adapter off; its config stays in `model.peft_config`. `prefix` and `layer_cls` are ignored.

    Returns:
        The adapters that are active now, or None where there are none.

    Raises:
        ValueError: there is no such adapter, or it is merged.
    """
    tuner, _ = tuner_of(model)
    tuner.check_known([adapter_name], "does not exist")
    # The network goes on showing the config, as in the reference: transformers takes it out itself. In a dict of its own: the
    # tuner's names the adapters that there are, and this one's name is free again.
    shown = tuner.shown_configs()
    tuner.delete_adapter(adapter_name)
    vars(tuner.model)[CONFIGS] = shown
    return tuner.active_adapters or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Switch the training of these adapters on or off."""
    tuner_of(model)[0].set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Hold the half-precision tensors of an adapter in float32. Copies of whole modules stay as they are."""
    if not autocast_adapter_dtype:
        return
    # The values change, and not the parameters: an optimizer may hold these already.
    for layer in tuner_of(model)[0].placed[adapter_name].values():
        for registry, name, slot in () if isinstance(layer, WholeModule) else layer.registered.values():
            if slot.role is not Role.BUFFER and registry[name].dtype in HALVES:
                registry[name].data = registry[name].data.to(torch.float32)
