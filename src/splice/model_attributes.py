"""What programs read on a PeftModel, in the reference's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from splice.base.backends.finding import numel_stood_for
from splice.base.bare import original_class
from splice.base.foreign_models import dtype_said
from splice.checkpoint.types import PeftType
from splice.config import PeftConfig
from splice.kinds.registry import all_methods, method_of
from splice.status import LayerStatus, ModelStatus, get_layer_status, get_model_status
from splice.surgery.base_changes import let_inputs_require_grad
from splice.surgery.tuner import Tuner


class ModelViews(nn.Module):
    """What is read on a PeftModel: which adapters there are, its size and status, and what else the reference's tells."""

    base_model: Tuner

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configs of the adapters, by name, in the order in which they came."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that take effect."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str:
        """The name of the active adapter; of the first, where several are."""
        names = self.base_model.selection.active
        return names[0] if names else ""

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of `active_adapter`."""
        return self.peft_config[next(iter(self.active_adapters), "")]

    @property
    def peft_type(self) -> PeftType | str | None:
        """The method of the first adapter; of the first that stands on others, where one does."""
        configs = list(self.peft_config.values())
        on_others = (config for config in configs if method_of(config).experts is not None)
        return next(on_others, configs[0]).peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that some adapter keeps a copy of."""
        names = {name for config in self.peft_config.values() for name in config.target_rule().modules_to_save or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The dtype that the network says it is in; None of a network that says nothing."""
        return dtype_said(self.base_model.model)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether some adapter takes effect now."""
        return self.base_model.selection.enabled and bool(self.base_model.selection.active)

    @property
    def special_peft_forward_args(self) -> set[str]:
        """Arguments of a call that are meant for adapters, and never reach the network."""
        return {"adapter_names"}.union(*(method.call_arguments for method in all_methods().values()))

    @property
    def _is_prompt_learning(self) -> bool:
        configs = self.base_model.peft_config.values()
        return any(config.is_prompt_learning for config in configs)

    @property
    def base_model_prepare_inputs_for_generation(self) -> Callable[..., object]:
        """The network's own `prepare_inputs_for_generation`.

        Raises:
            AttributeError: it has none.
        """
        return cast("Callable[..., object]", self.base_model.model.prepare_inputs_for_generation)

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type[nn.Module]:
        """The class that the network has without adapters."""
        return original_class(self.base_model.model)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Let the inputs of the network's blocks require gradients: blocks that are recomputed pass them on only then."""
        let_inputs_require_grad(model)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; shared ones count once."""
        parameters = [(p.requires_grad, numel_stood_for(p)) for p in self.parameters()]
        return sum(n for trainable, n in parameters if trainable), sum(n for _, n in parameters)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[LayerStatus]:
        """One entry for every adapted layer; see `splice.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> ModelStatus:
        """The status of the whole model; see `splice.get_model_status`."""
        return get_model_status(self)
