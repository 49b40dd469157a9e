"""The record of AdaMSS."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import torch

from splice.base.layers import LayerKind
from splice.checkpoint.types import PeftType
from splice.kinds.registry import Method, register
from splice.methods.adamss.allocation import update_and_allocate
from splice.methods.adamss.config import AdamssConfig, check
from splice.methods.adamss.layer import AdamssLayer
from splice.methods.default_targets import LORA_TARGETS


def _running(side: str, which: int) -> Callable[[AdamssLayer], object]:
    """A view of what training keeps of the importance of all A, or all B."""

    def read(layer: AdamssLayer) -> object:
        if not layer.importance:
            return None
        found = [layer.importance.get(f"adamss_{side}.{number}") for number in range(layer.count)]
        return [None if pair is None else pair[which] for pair in found]

    return read


METHOD = register(
    Method(
        name=PeftType.ADAMSS,
        summary="Adds a low-rank update to each of several groups of a weight's rows, in the weight's own directions.",
        config=AdamssConfig,
        prefix="adamss_",
        tensor_names=frozenset({"adamss_A", "adamss_B", "adamss_newB"}),
        layers=MappingProxyType({LayerKind.LINEAR: AdamssLayer}),
        tuner_methods=MappingProxyType({"update_and_allocate": update_and_allocate}),
        containers=("adamss_A", "adamss_B"),
        layer_views=MappingProxyType(
            {
                "train_subspace_index": lambda layer: list(range(layer.count)),
                "seg_result": lambda layer: dict(enumerate(layer.rows)),
                "scatter_index": lambda layer: torch.cat(layer.rows),
                "exp_avg_ipt_A": _running("A", 0),
                "exp_avg_ipt_B": _running("B", 0),
                "exp_avg_unc_A": _running("A", 1),
                "exp_avg_unc_B": _running("B", 1),
            }
        ),
        default_targets=MappingProxyType({**LORA_TARGETS, "vit": ["query", "value"]}),
        check=check,
        paper="openreview 8ZdWmpYxT0",
    )
)
