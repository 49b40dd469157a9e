"""Adaptive subspace allocation: groups of rows that matter least are no longer trained.

The importance of a tensor is the running mean of |value * gradient|, times how much that varies, as in AdaLoRA. Groups that
were given up stay as they are, and go on counting in the output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from splice.kinds.adapters import Adapters, layers_of
from splice.methods.adamss.config import AdamssConfig
from splice.methods.adamss.layer import AdamssLayer


@torch.no_grad()
def update_and_allocate(adapters: Adapters, global_step: int) -> None:
    """Follow the schedule; to be called after `backward` and the optimizer's step, before `zero_grad`.

    Nothing happens outside of the schedule, and to adapters without `use_asa`.

    Args:
        adapters: found on the model: `model.base_model.update_and_allocate(step)`.
        global_step: the number of the step.

    Raises:
        RuntimeError: there are no gradients.
    """
    for name, config in adapters.peft_config.items():
        if not isinstance(config, AdamssConfig) or not config.use_asa or config.inference_mode:
            continue
        if not config.init_warmup <= global_step <= config.final_warmup:
            continue
        layers = layers_of(adapters, [name], AdamssLayer)
        found = [_update_importance(layer, config) for layer in layers.values()]
        if True not in found:
            raise RuntimeError(
                "`update_and_allocate` needs gradients: call it after `backward` and before `zero_grad`, in every step"
            )
        if global_step % config.mask_interval == 0:
            _allocate(layers, _budget(layers, config, global_step))


def _update_importance(layer: AdamssLayer, config: AdamssConfig) -> bool:
    """Follow the importance of every tensor that has a gradient by one step; whether one has."""
    found = False
    for suffix in (f"adamss_{side}.{number}" for side in "AB" for number in range(layer.count)):
        tensor = layer.tensor(suffix)
        if tensor.grad is None:
            continue
        found, now = True, (tensor * tensor.grad).abs()
        mean, spread = layer.importance.get(suffix) or (torch.zeros_like(now), torch.zeros_like(now))
        beta1, beta2 = config.asa_importance_beta, config.asa_uncertainty_beta
        # By the mean before this step, unlike AdaLoRA.
        spread = beta2 * spread + (1 - beta2) * (now - mean).abs()
        layer.importance[suffix] = beta1 * mean + (1 - beta1) * now, spread
    return found


def _budget(layers: Mapping[str, AdamssLayer], config: AdamssConfig, step: int) -> int:
    """How many groups of the whole model are trained from this step on."""
    start, end = sum(layer.count for layer in layers.values()), config.asa_target_subspaces
    left = 1 - (step - config.init_warmup) / (config.final_warmup - config.init_warmup)
    return int(end + (start - end) * left**config.asa_schedule_exponent)


def _allocate(layers: Mapping[str, AdamssLayer], budget: int) -> None:
    """Go on with the groups of the largest importance, of those that are trained."""
    scores = {(path, number): s for path, layer in layers.items() for number, s in _scores(layer).items()}
    ordered = sorted(scores.values(), reverse=True)
    threshold = ordered[budget - 1] if budget < len(ordered) else -math.inf
    # One fewer than the budget, as in the reference: what is trained depends on it. But never none.
    kept = {place for place, score in scores.items() if score > threshold}
    kept = kept or {place for place, score in scores.items() if score >= threshold}
    for path, number in scores.keys() - kept:
        for tensor in (layers[path].a(number), layers[path].b(number)):
            tensor.requires_grad_(False)
            tensor.grad = None
    for layer in layers.values():
        layer.importance = {}


def _scores(layer: AdamssLayer) -> dict[int, float]:
    """The importance of each group that is trained, by its number."""
    found = {}
    for number in range(layer.count):
        sides = [layer.importance.get(f"adamss_{side}.{number}") for side in "AB"]
        known = [side for side in sides if side is not None]
        if known:
            found[number] = sum(float((mean * spread).mean()) for mean, spread in known)
    return found
