"""AdaLoRA's budget: which ranks are left, by their importance in training (arXiv 2303.10512, section 3.2, algorithm 1).

The importance of a value is the running mean of |value * gradient|, times how much that varies; that of a rank is the sum
over its three parts.
"""

from __future__ import annotations

import torch

from splice.kinds.adapters import Adapters, layers_of
from splice.methods.adalora.layers import AdaLora, AdaLoraConfig


def update_and_allocate(adapters: Adapters, global_step: int) -> None:
    """Follow the schedule of the ranks; to be called after `backward` and the optimizer's step, before `zero_grad`.

    Args:
        adapters: found on the model: `model.base_model.update_and_allocate(step)`.
        global_step: the number of steps done, counted from 0 or 1, at most `total_step`.

    Raises:
        ValueError: no AdaLoRA adapter is in training.
        RuntimeError: there are no gradients.
    """
    name, config = in_training(adapters)
    assert config.total_step is not None
    layers = layers_of(adapters, [name], AdaLora)
    last = config.total_step - config.tfinal
    with torch.no_grad():
        if global_step < last:
            update_importance(layers, config)
        if global_step > last:
            for layer in layers.values():
                if layer.kept is not None:
                    prune(layer, layer.kept)
            return
        count, masks = budget_at(layers, config, global_step)
        if masks or global_step == last:
            allocate(layers, config, count)
        if global_step == last:
            for layer in layers.values():
                layer.importance = {}


def in_training(adapters: Adapters) -> tuple[str, AdaLoraConfig]:
    """The adapter that is in training, and its config.

    Raises:
        ValueError: there is none.
    """
    # By the class: adapters of other methods may be in training beside it.
    ours = {name: config for name, config in adapters.peft_config.items() if isinstance(config, AdaLoraConfig)}
    found = next(((name, config) for name, config in ours.items() if not config.inference_mode), None)
    if found is None:
        raise ValueError("`update_and_allocate` needs an adapter in training: load it with `is_trainable=True`")
    return found


def update_importance(layers: dict[str, AdaLora], config: AdaLoraConfig) -> None:
    """Follow the importance of every tensor by one step; raises RuntimeError where no tensor has a gradient."""
    seen = False
    for layer in layers.values():
        for part in ("lora_A", "lora_E", "lora_B"):
            tensor = layer.tensor(part)
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


def budget_at(layers: dict[str, AdaLora], config: AdaLoraConfig, step: int) -> tuple[int, bool]:
    """How many ranks the whole model has at this step, and whether they are allocated anew."""
    assert config.total_step is not None
    start, end = sum(len(layer.lora_A) for layer in layers.values()), config.target_r * len(layers)
    if step <= config.tinit:
        return start, False
    if step > config.total_step - config.tfinal:
        return end, True
    left = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
    return int((start - end) * left**3 + end), step % config.deltaT == 0


def allocate(layers: dict[str, AdaLora], config: AdaLoraConfig, count: int) -> None:
    """Set the least important ranks to zero, all but `count` of the whole model, and write down which are left."""
    scores = {path: _scores(layer) for path, layer in layers.items()}
    # On the CPU, since layers may be on several devices; and by a threshold, as in the reference: of ranks that are equally
    # important at the threshold all go, so that fewer than `count` may be left.
    ordered = torch.cat([score.cpu() for score in scores.values()]).sort().values
    gone = len(ordered) - count
    threshold = ordered[gone - 1] if gone > 0 else None
    pattern = {}
    for path, layer in layers.items():
        above = torch.ones_like(scores[path], dtype=torch.bool)
        if threshold is not None:
            above = scores[path] > threshold.to(scores[path].device)
        kept = tuple(above.tolist())
        prune(layer, kept)
        layer.kept = kept
        pattern[f"{path}.lora_E"] = list(kept)
    config.rank_pattern = pattern


def _scores(layer: AdaLora) -> torch.Tensor:
    """(r): the importance of each rank."""
    if not layer.importance:
        return torch.zeros_like(layer.lora_E[:, 0])
    a, e, b = (torch.mul(*layer.importance[part]) for part in ("lora_A", "lora_E", "lora_B"))
    return e[:, 0] + a.mean(1) + b.mean(0)


def prune(layer: AdaLora, kept: tuple[bool, ...]) -> None:
    layer.lora_E.mul_(torch.tensor(kept, device=layer.lora_E.device)[:, None])
