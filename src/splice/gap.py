"""How far apart the outputs of a model are on two forms of its base: in 4 bits, on which it was trained, and in 16."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from splice.loading.saving import get_peft_model_state_dict
from splice.model import PeftModel


class BaseGap(NamedTuple):
    """`str(gap)`: "the outputs differ by 2.1 % (largest 0.31); 97.5 % of the predictions are the same".

    Attributes:
        largest: the largest absolute difference of a value.
        relative: the norm of the difference, divided by that of the output on the other base.
        same_predictions: for how many of the places in the output the largest value of the last dimension is the same one;
            1.0 for all.
    """

    largest: float
    relative: float
    same_predictions: float

    def __str__(self) -> str:
        return (
            f"the outputs differ by {self.relative:.1%} (largest {self.largest:.2g}); {self.same_predictions:.1%} of the "
            "predictions are the same"
        )


@torch.no_grad()
def base_gap(model: PeftModel, batch: Mapping[str, Any], other: nn.Module) -> BaseGap:
    """How far the outputs with the active adapters are from those on another form of the base.

    Args:
        model: with its adapters.
        batch: keyword arguments of a forward, without labels.
        other: the same base in another form, as the adapters were trained on or are to be merged into. It is adapted for
            the call and is what it was afterwards.

    Raises:
        ValueError: no adapter is active.
        TypeError: the model gives neither a tensor nor logits.
        AdapterMismatchError: `other` is no form of this base.
    """
    active = model.active_adapters
    flags = [(module, module.training) for network in (model, other) for module in network.modules()]
    beside: PeftModel | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is another form is what is asked for
            for name in active:
                tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
                config = copy.deepcopy(model.peft_config[name])
                if beside is None:
                    beside = PeftModel.from_pretrained(other, adapter_name=name, config=config, tensors=tensors)
                else:
                    beside.load_adapter(None, name, config=config, tensors=tensors)
        if beside is None:
            raise ValueError("the model has no active adapter; compare the two networks themselves")
        beside.base_model.set_adapter(active)
        model.eval()
        return _gap(_output(model(**batch)), _output(beside(**batch)))
    finally:
        if beside is not None:
            beside.unload()
        for module, training in flags:
            module.training = training


def _output(found: Any) -> torch.Tensor:
    output = found if isinstance(found, torch.Tensor) else found.get("logits") if isinstance(found, Mapping) else None
    if output is None:
        raise TypeError(f"the model gives a {type(found).__name__}, without logits to compare")
    return output.float()


def _gap(here: torch.Tensor, there: torch.Tensor) -> BaseGap:
    there = there.to(here.device)
    difference = here - there
    same = (here.argmax(-1) == there.argmax(-1)).float().mean()
    norm = torch.linalg.vector_norm(there)
    return BaseGap(
        float(difference.abs().max()), float(torch.linalg.vector_norm(difference) / norm) if norm else 0.0, float(same)
    )
