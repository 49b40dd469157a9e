"""What programs read and call on a PeftModel beyond its own methods, in the reference's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from splice.base.bare import original_class
from splice.base.foreign_models import dtype_said
from splice.kinds.registry import all_methods, method_of
from splice.surgery.base_changes import let_inputs_require_grad
from splice.surgery.tuner import Tuner


class ModelViews:
    """Attributes and methods that the reference's PeftModel has, on ours."""

    base_model: Tuner

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
        return any(method_of(config).network_layer is not None for config in configs)

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
