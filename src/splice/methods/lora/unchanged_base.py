"""LoRA that began at a part of the base weight, written as LoRA for the unchanged base (PiSSA, OLoRA, CorDA, LoRA-GA).

With A0 and B0 the factors right after the initialisation, `s (B A - B0 A0) = s [B, -B0] [A; A0]`: twice the rank, and nothing
is taken out of the base any more.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from splice.config import PeftConfig, PeftType, copy_config
from splice.errors import warn

_BASE_CHANGING = ("pissa", "corda", "olora", "lora_ga")


def plain_config(config: PeftConfig) -> PeftConfig:
    """The config of the plain adapter.

    Raises:
        ValueError: it is no LoRA, or its scales do not follow from one rank.
    """
    if config.peft_type != PeftType.LORA:
        raise ValueError(
            f"`path_initial_model_for_weight_conversion` is for LoRA, whose initialisations may change the base; this is "
            f"{config.peft_type}."
        )
    own: Any = config
    init = own.init_lora_weights
    if own.use_rslora and (own.rank_pattern or own.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` is not supported with `use_rslora` and rank_pattern or "
            "alpha_pattern: ranks that double would change the scales."
        )
    if init is not True and not (isinstance(init, str) and init.startswith(_BASE_CHANGING)):
        use = f"has no use with init_lora_weights={init!r}, which leaves the base as it is"
        warn(f"`path_initial_model_for_weight_conversion` {use}.")
    return copy_config(
        config,
        init_lora_weights=True,
        r=2 * own.r,
        lora_alpha=own.lora_alpha * (math.sqrt(2) if own.use_rslora else 2),
        rank_pattern={key: 2 * rank for key, rank in own.rank_pattern.items()},
        alpha_pattern={key: 2 * alpha for key, alpha in own.alpha_pattern.items()},
    )


def plain_tensors(tensors: Mapping[str, torch.Tensor], initial: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of the plain adapter; `initial` holds the adapter as it was right after its initialisation.

    Raises:
        ValueError: it has other tensors.
    """
    from splice.loading.state import load_peft_weights  # which itself needs to know how names are saved

    before = load_peft_weights(os.fspath(initial))
    factors = {name for name in tensors if _is_a(name) or _is_b(name)}
    missing = sorted(factors - before.keys())
    if missing:
        raise ValueError(f"{initial} lacks {missing[0]}, so it is not this adapter as it was initialised.")
    result = dict(tensors)
    for name in factors:
        old = before[name].to(tensors[name])
        result[name] = torch.cat([tensors[name], old]) if _is_a(name) else torch.cat([tensors[name], -old], dim=1)
    return result


def _is_a(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_embedding_A"))


def _is_b(name: str) -> bool:
    return name.endswith((".lora_B.weight", ".lora_embedding_B"))
