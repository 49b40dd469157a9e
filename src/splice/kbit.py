"""Making a base model ready for training adapters on it, most of all one whose weights are quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn

from splice.base.backends.marks import needs_half_precision, quantised_by
from splice.base.backends.plain import holds_codes
from splice.base.foreign_models import accepted_by
from splice.errors import UnsupportedFeatureError

# Tensors of these dtypes are not trained well: small steps round to none.
_HALVES = (torch.float16, torch.bfloat16)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, object] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a base model, hold what is in half precision in float32, and let a quantised one recompute its blocks.

    It is changed in place. Its `Parameter` objects stay, with other values in them. Of a base whose layers compute in half
    precision whatever comes nothing is cast.

    Args:
        model: the base model, as transformers loads it.
        use_gradient_checkpointing: of a quantised model; any other is left as it is.
        gradient_checkpointing_kwargs: passed to `gradient_checkpointing_enable`. With `use_reentrant=False` no gradient is
            asked of the embedded input.
        auto_clear_cache: give memory that the casts have left back to the accelerator.

    Returns:
        The model.

    Raises:
        UnsupportedFeatureError: (a NotImplementedError) it is quantised, and cannot do gradient checkpointing. Nothing has
            been changed.
    """
    options = dict(gradient_checkpointing_kwargs or {})
    checkpoints = use_gradient_checkpointing and bool(quantised_by(model))
    if checkpoints:
        _check_checkpointing(model)
    for parameter in model.parameters():
        parameter.requires_grad = False
    if not needs_half_precision(model):
        # Other values in the same parameter: whoever holds it, and whatever shares it, goes on with it.
        for parameter in model.parameters():
            if parameter.dtype in _HALVES and not holds_codes(parameter):
                parameter.data = parameter.data.to(torch.float32)
        if auto_clear_cache:
            _clear_caches()
    if checkpoints:
        if options.get("use_reentrant", True):
            cast("Callable[[], None]", model.enable_input_require_grads)()
        enable = cast("Callable[..., None]", model.gradient_checkpointing_enable)
        enable(**accepted_by(enable, {"gradient_checkpointing_kwargs": options}))
    return model


def _check_checkpointing(model: nn.Module) -> None:
    for method in ("gradient_checkpointing_enable", "enable_input_require_grads"):
        try:
            getattr(model, method)
        except AttributeError:
            raise UnsupportedFeatureError(
                f"gradient checkpointing was asked for, and {type(model).__name__} has no method `{method}`, as models of "
                "transformers have. Pass `use_gradient_checkpointing=False`."
            ) from None


def _clear_caches() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.xpu.is_available():
        torch.xpu.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
