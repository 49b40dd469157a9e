"""Rank and alpha of each layer, which other programs keep beside its tensors, and fields of a config that say the same."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from splice.checkpoint.tensors import Weights
from splice.errors import CheckpointError
from splice.methods.lora.outline import alpha_of


class Scale(NamedTuple):
    """What the product of a layer's factors is multiplied with: alpha / rank."""

    # Rows of A.
    rank: int
    # As a reader needs it that divides it by the rank.
    alpha: float


def rank_of(down: tuple[int, ...], up: tuple[int, ...], place: str) -> int:
    """The rank of two factors of these shapes.

    Raises:
        CheckpointError: they are not those of one layer.
    """
    if len(down) < 2 or len(up) != len(down) or 0 in (*down, *up):
        raise CheckpointError(f"{place}: factors of the shapes {down} and {up} are not those of a layer")
    # Of a convolution in groups B has a part of the rank for each.
    if up[1] != down[0] and (len(up) == 2 or down[0] % up[1]):
        raise CheckpointError(f"{place}: A has {down[0]} rows and B {up[1]} columns, which are the rank both")
    return down[0]


def alpha_in(weights: Weights, name: str) -> float:
    """An alpha that is a tensor.

    Raises:
        CheckpointError: it is more than one number, or none that anything can be multiplied with.
    """
    (tensor,) = weights.read([name])
    if tensor.numel() != 1 or not math.isfinite(float(tensor)):
        raise CheckpointError(f"{weights.place}: {name!r} is no number: {tensor.tolist()}")
    return float(tensor)


def scale_in(fields: Mapping[str, object], path: str, rank: int) -> Scale:
    """That of the layer at `path`, by the config: its patterns, and its square root of the rank, are in the alpha.

    Raises:
        CheckpointError: the config does not say it.
    """
    alpha = alpha_of(fields, path)
    if alpha is None or rank < 1 or not math.isfinite(alpha):
        raise CheckpointError(f"{path}: the config gives no number as alpha of this layer, or its rank is {rank}")
    return Scale(rank, alpha * math.sqrt(rank) if fields.get("use_rslora") else alpha)


def fields_of(scales: Mapping[str, Scale]) -> dict[str, object]:
    """The fields of a config for exactly these layers, by path."""
    # The most frequent value for all, and patterns for the others: so a file of one rank has no patterns at all.
    rank = Counter(scale.rank for scale in scales.values()).most_common(1)[0][0]
    alpha = Counter(scale.alpha for scale in scales.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {_exactly(path): each.rank for path, each in scales.items() if each.rank != rank},
        "alpha_pattern": {_exactly(path): _number(each.alpha) for path, each in scales.items() if each.alpha != alpha},
        "target_modules": targets(scales),
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }


def targets(paths: Mapping[str, object]) -> list[str] | str:
    """What selects these modules and no others."""
    # A name is looked for at the end of paths. One without a dot could be at the end of many: then an expression for the
    # whole path.
    if all("." in path for path in paths):
        return sorted(paths)
    return "|".join(re.escape(path) for path in sorted(paths))


def _exactly(path: str) -> str:
    return "^" + re.escape(path)


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
