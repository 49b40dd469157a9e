"""How AdaLoRA's ranks shrink: the budget of each step, and which of the ranks are worth the least.

Zhang et al., arXiv 2303.10512, section 3.2 and algorithm 1: the importance of a value is the running mean of |value *
gradient|, times how much that varies; that of a rank is the sum over its three parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from splice.methods.adalora import AdaLoraConfig, AdaLoraLayer
    from splice.surgery.tuner import Tuner


def update_and_allocate(tuner: Tuner, global_step: int) -> None:
    """Follow the schedule of the ranks; to be called after `backward` and the optimizer's step, before `zero_grad`.

    Args:
        tuner: found on the model: `model.base_model.update_and_allocate(step)`.
        global_step: the number of steps done, counted from 0 or 1, at most `total_step`.

    Raises:
        ValueError: no AdaLoRA adapter is in training.
        RuntimeError: there are no gradients.
    """
    name = next((n for n, config in tuner.peft_config.items() if not config.inference_mode), None)
    if name is None:
        raise ValueError("`update_and_allocate` needs an adapter in training: load it with `is_trainable=True`")
    config: Any = tuner.peft_config[name]
    layers = _layers(tuner, name)
    last = config.total_step - config.tfinal
    with torch.no_grad():
        if global_step < last:
            _update_importance(layers, config)
        if global_step > last:
            for layer in layers.values():
                if layer.kept is not None:
                    _prune(layer, layer.kept)
            return
        count, masks = _budget(layers, config, global_step)
        if masks or global_step == last:
            _allocate(layers, config, count)
        if global_step == last:
            for layer in layers.values():
                layer.importance = {}


def _layers(tuner: Tuner, name: str) -> dict[str, AdaLoraLayer]:
    from splice.methods.adalora import AdaLoraLayer

    return {path: layer for path, layer in tuner.placed[name].items() if isinstance(layer, AdaLoraLayer)}


def _update_importance(layers: dict[str, AdaLoraLayer], config: AdaLoraConfig) -> None:
    """Raises RuntimeError where nothing has a gradient."""
    seen = False
    for layer in layers.values():
        for part in ("lora_A", "lora_E", "lora_B"):
            tensor = layer._parameters[part]
            assert tensor is not None
            seen = seen or tensor.grad is not None
            now = torch.zeros_like(tensor) if tensor.grad is None else (tensor * tensor.grad).abs()
            mean, spread = layer.importance.get(part) or (torch.zeros_like(tensor), torch.zeros_like(tensor))
            mean = config.beta1 * mean + (1 - config.beta1) * now
            spread = config.beta2 * spread + (1 - config.beta2) * (now - mean).abs()
            layer.importance[part] = mean, spread
    if not seen:
        raise RuntimeError(
            "`update_and_allocate` needs gradients: call it after `backward` and before `zero_grad`, in every step"
        )


def _budget(layers: dict[str, AdaLoraLayer], config: AdaLoraConfig, step: int) -> tuple[int, bool]:
    """How many ranks the whole model has at this step, and whether they are allocated anew."""
    assert config.total_step is not None
    start, end = sum(len(layer.lora_A) for layer in layers.values()), config.target_r * len(layers)
    if step <= config.tinit:
        return start, False
    if step > config.total_step - config.tfinal:
        return end, True
    left = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
    return int((start - end) * left**3 + end), step % config.deltaT == 0


def _allocate(layers: dict[str, AdaLoraLayer], config: AdaLoraConfig, count: int) -> None:
    """Set the least important ranks to zero, all but `count` of the whole model, and write down which are left."""
    scores = {path: _scores(layer) for path, layer in layers.items()}
    ordered = torch.cat([score.cpu() for score in scores.values()]).sort().values
    gone = len(ordered) - count
    threshold = ordered[gone - 1] if gone > 0 else None
    pattern = {}
    for path, layer in layers.items():
        above = torch.ones_like(scores[path], dtype=torch.bool)
        if threshold is not None:
            above = scores[path] > threshold.to(scores[path].device)
        kept = tuple(above.tolist())
        _prune(layer, kept)
        layer.kept = kept
        pattern[f"{path}.lora_E"] = list(kept)
    config.rank_pattern = pattern


def _scores(layer: AdaLoraLayer) -> torch.Tensor:
    """(r): the importance of each rank."""
    if not layer.importance:
        return torch.zeros_like(layer.lora_E[:, 0])
    a, e, b = (torch.mul(*layer.importance[part]) for part in ("lora_A", "lora_E", "lora_B"))
    return e[:, 0] + a.mean(1) + b.mean(0)


def _prune(layer: AdaLoraLayer, kept: tuple[bool, ...]) -> None:
    layer.lora_E.mul_(torch.tensor(kept, device=layer.lora_E.device)[:, None])
