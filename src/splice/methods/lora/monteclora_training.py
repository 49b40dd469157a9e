"""MonteCLoRA in a trainer: its penalties become part of the loss."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import nn

from splice.base.bare import walk_bare
from splice.kinds.adapters import adapters_on
from splice.methods.lora.monteclora import monteclora_loss


class _Trainer(Protocol):
    """What the class beside it has: transformers' Trainer."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss; with `return_outputs` a pair of it and the output."""
        ...


class MontecloraTrainerMixin:
    """Adds MonteCLoRA's penalties to a trainer's loss: `class MyTrainer(MontecloraTrainerMixin, Trainer)`."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """As the trainer's, in training with the penalties of the active adapters added."""
        below = cast(_Trainer, super())
        found = below.compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss, output = found if return_outputs else (found, None)
        if model.training:
            # The model may stand inside wrappers, as of data parallelism.
            around = (adapters_on(module) for module in walk_bare(model).values())
            adapters = next((one for one in around if one is not None), None)
            if adapters is not None:
                penalty = monteclora_loss(adapters)
                loss = loss + (penalty.to(loss.device) if isinstance(penalty, torch.Tensor) else penalty)
        return (loss, output) if return_outputs else cast(torch.Tensor, loss)
