"""The record of X-LoRA, and what its classifier is asked and told on a model."""

from __future__ import annotations

from types import MappingProxyType

import torch

from splice.checkpoint.types import PeftType
from splice.kinds.adapters import Adapters, layers_of
from splice.kinds.registry import Experts, Method, register
from splice.methods.xlora.classifier import CLASSIFIER, XLoraClassifier
from splice.methods.xlora.config import XLoraConfig, check, places


def _active(adapters: Adapters) -> XLoraClassifier:
    layers = layers_of(adapters, [*adapters.selection.active, *adapters.placed], XLoraClassifier)
    return next(iter(layers.values()))


def _set_topk(adapters: Adapters, value: int | None) -> None:
    """How many experts a token is given from now on."""
    _active(adapters).config.top_k_lora = value


def _set_global_weight(adapters: Adapters, weight: float) -> None:
    """What the sum over the experts is multiplied with from now on."""
    _active(adapters).config.global_scaling_weight = weight


def _global_weight(adapters: Adapters) -> float:
    """What the sum over the experts is multiplied with."""
    return float(_active(adapters).config.global_scaling_weight)


def _set_pass_value(adapters: Adapters, value: float | None) -> None:
    """Recorded alone: in the first call of the network the experts are switched off."""
    layer = _active(adapters)
    layer.config.scaling_pass_value = 1 / len(layer.experts) if value is None else value


def _latest(adapters: Adapters) -> torch.Tensor | None:
    """The weights of the last call, (batch, T, layers, experts)."""
    return _active(adapters).latest


def _log(adapters: Adapters) -> list[torch.Tensor]:
    """The weights of all calls since `enable_scalings_logging`."""
    return list(_active(adapters).log or ())


def _start_log(adapters: Adapters) -> None:
    """Keep the weights of all calls from now on."""
    layer = _active(adapters)
    layer.log = layer.log or []


def _stop_log(adapters: Adapters) -> None:
    """Keep them no longer, and forget those that were kept."""
    _active(adapters).log = None


def _clear_log(adapters: Adapters) -> None:
    """Forget those that were kept."""
    layer = _active(adapters)
    layer.log = None if layer.log is None else []


def _buckets(adapters: Adapters) -> dict[int, tuple[list[int], list[torch.Tensor]]]:
    """The kept weights by the length of their sequences: with the numbers of the calls."""
    found: dict[int, tuple[list[int], list[torch.Tensor]]] = {}
    for number, weights in enumerate(_active(adapters).log or ()):
        numbers, tensors = found.setdefault(weights.shape[1], ([], []))
        numbers.append(number)
        tensors.append(weights)
    return found


METHOD = register(
    Method(
        name=PeftType.XLORA,
        summary="Weighs trained LoRA adapters for each token, by a classifier of the base's hidden states.",
        config=XLoraConfig,
        prefix="internal_xlora_",
        tensor_names=frozenset({CLASSIFIER}),
        network_layer=XLoraClassifier,
        experts=Experts(PeftType.LORA, places),
        tuner_methods=MappingProxyType(
            {
                "set_topk_lora": _set_topk,
                "set_global_scaling_weight": _set_global_weight,
                "get_global_scaling_weight": _global_weight,
                "set_scaling_pass_value": _set_pass_value,
                "get_latest_scalings": _latest,
                "get_scalings_log": _log,
                "enable_scalings_logging": _start_log,
                "disable_scalings_logging": _stop_log,
                "clear_scalings_log": _clear_log,
                "get_bucketed_scalings_log": _buckets,
            }
        ),
        check=check,
        paper="arXiv 2402.07148",
    )
)
