"""Steps that programs take after the reference's example, and that are parts of adding or loading an adapter here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from splice.config import PeftConfig, PromptLearningConfig
from splice.kinds.registry import method_of
from splice.surgery.tuner import tuner_of


def check_copied(copied: Iterable[str] | None, wanted: Iterable[str] | None, adapter_name: str) -> None:
    """Raise where an adapter that has copies of the modules `copied` lacks one of those `wanted`.

    Raises:
        ValueError: it does.
    """
    missing = [name for name in wanted or () if name not in (copied or ())]
    if missing:
        raise ValueError(
            f"adapter {adapter_name!r} has no copies of {missing}, and gets none later: name them in `modules_to_save` of "
            "the config with which it is added."
        )


def set_additional_trainable_modules(
    model: nn.Module, peft_config: PeftConfig, model_config: object, adapter_name: str, activate_adapter: bool = True
) -> None:
    """Nothing is left to do: what a config keeps whole is copied when its adapter comes.

    Raises:
        ValueError: there is no such adapter, or the config names a module that it has no copy of.
    """
    set_trainable(model, adapter_name, peft_config.target_rule().modules_to_save, peft_config.inference_mode)


def set_trainable(
    model: nn.Module,
    adapter_name: str,
    module_names: Iterable[str] | None,
    inference_mode: bool,
    strict_module_check: bool = False,
    wrapper_cls: type | None = None,
    activate_adapter: bool = True,
    **wrapper_kwargs: object,
) -> None:
    """Nothing is left to do, as in `set_additional_trainable_modules`.

    Raises:
        ValueError: there is no such adapter, or it has no copy of one of these modules.
    """
    tuner, _ = tuner_of(model)
    tuner.check_known([adapter_name])
    check_copied(tuner.peft_config[adapter_name].target_rule().modules_to_save, module_names, adapter_name)


def prepare_prompt_learning_config(
    peft_config: PromptLearningConfig, model_config: Mapping[str, Any]
) -> PromptLearningConfig:
    """Fill in what a config of prompt learning leaves open, from the fields of a base model's config; the same object.

    Raises:
        ValueError: a size stands in neither.
    """
    network = nn.Module()
    network.config = dict(model_config)  # type: ignore[assignment]
    layer = method_of(peft_config).network_layer
    sizes = {} if layer is None else layer.resolved(network, peft_config)
    for field, value in sizes.items():
        setattr(peft_config, field, value)
    return peft_config
