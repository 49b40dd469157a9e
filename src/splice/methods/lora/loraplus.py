"""LoRA+: B learns faster than A.

Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354, section 3: for features to be learned
well in wide networks, the learning rate of B has to be a multiple of that of A.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from splice.base.backends.marks import keep_full_states
from splice.discovery import public
from splice.errors import PeftWarning, warn
from splice.kinds.host import host_of


@public
def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimizer of `optimizer_cls` for all that is trained now, in four groups.

    They are: A and all other matrices, at `lr`; the factors on embeddings, at `loraplus_lr_embedding`; B and all vectors, at
    `lr * loraplus_lr_ratio`; biases and layer norms, at that rate and without decay.

    Args:
        model: with LoRA.
        optimizer_cls: AdamW, SGD, or one with a state of 8 bits.
        lr: learning rate of A.
        loraplus_lr_ratio: that of B divided by that of A; above 1.
        loraplus_lr_embedding: of A and B on embeddings.
        loraplus_weight_decay: of the first three groups.
        **kwargs: passed to `optimizer_cls`.
    """
    if kwargs.get("weight_decay"):
        warn(
            f"`weight_decay={kwargs['weight_decay']}` has no effect: each group of the optimizer has its own. Pass "
            "`loraplus_weight_decay`.",
            PeftWarning,
        )
    groups: dict[str, list[nn.Parameter]] = {"a": [], "embedding": [], "b": [], "b, no decay": []}
    for group, parameter in _grouped(model):
        groups[group].append(parameter)
    fast = lr * loraplus_lr_ratio
    rates = {"a": lr, "embedding": loraplus_lr_embedding, "b": fast, "b, no decay": fast}
    decays = {**dict.fromkeys(groups, loraplus_weight_decay), "b, no decay": 0.0}
    made: Any = optimizer_cls
    options = [{"params": groups[g], "weight_decay": decays[g], "lr": rates[g]} for g in groups]
    optimizer: torch.optim.Optimizer = made(options, lr=lr, **kwargs)
    keep_full_states(optimizer_cls, (module for module in model.modules() if isinstance(module, nn.Embedding)))
    return optimizer


def _grouped(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter that is trained, once, with its group."""
    suffixes = _suffixes(model)
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            # What an adapter calls it, and not where it stands: there the adapter's own name is among the words.
            parts = suffixes.get(id(parameter), f"{path}.{name}").split(".")
            if parts[0] in ("lora_embedding_A", "lora_embedding_B"):
                yield "embedding", parameter
            elif "lora_B" in parts or parameter.dim() == 1:
                spared = parts[-1].startswith("bias") or isinstance(module, nn.LayerNorm)
                yield ("b, no decay" if spared else "b"), parameter
            else:
                yield "a", parameter


def _suffixes(model: nn.Module) -> dict[int, str]:
    """`id` of each tensor of an adapter -> its suffix."""
    hosts = (host for module in model.modules() if (host := host_of(module)) is not None)
    layers = (layer for host in hosts for layer in host.layers.values())
    return {id(item.registry[item.name]): name for layer in layers for name, item in layer.registered.items()}
