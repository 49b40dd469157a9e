"""Commit: the plan becomes adapter layers on the model. All that can fail is done before the model is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from splice.config import PeftConfig
from splice.loading.checkpoint import Weights
from splice.loading.plan import Placement, Plan
from splice.methods.layer import AdapterLayer
from splice.surgery.whole import WholeModule, copy_bias
from splice.weights.dense import device_of


@dataclass(frozen=True)
class Built:
    """An adapter layer that is finished and not yet attached."""

    placement: Placement
    layer: AdapterLayer


def build_loaded(plan: Plan, config: PeftConfig, weights: Weights, autocast: bool) -> list[Built]:
    """Read every tensor into its own memory, on its layer's device and in its final dtype, and build the layers.

    Slots that the checkpoint has nothing for (only with `strict=False`) are initialised as those of a new adapter.
    """
    built = []
    with weights.reader() as reader:  # type: ignore[attr-defined]
        for placement in plan.placements:
            device = device_of(placement.base)
            tensors, empty = {}, {}
            for suffix, shape in placement.slots.items():
                dtype, name = placement.dtype(suffix, autocast), plan.sources.get(placement.key(suffix))
                if name is None:
                    empty[suffix] = shape
                else:
                    tensors[suffix] = reader.read(name).to(device=device, dtype=dtype)
            if empty:
                fresh = new_tensors(placement, config, autocast)
                tensors.update({suffix: fresh[suffix] for suffix in empty})
            built.append(_build(placement, config, tensors))
    return built


def build_new(plan: Plan, config: PeftConfig, autocast: bool) -> list[Built]:
    """Adapter layers with the initial values of the method."""
    return [_build(p, config, new_tensors(p, config, autocast)) for p in plan.placements]


@torch.no_grad()
def new_tensors(placement: Placement, config: PeftConfig, autocast: bool) -> dict[str, torch.Tensor]:
    """Tensors for one layer of a new adapter: drawn in float32, then brought to their dtype and device."""
    whole = placement.layer_class is WholeModule
    drawn = {
        suffix: torch.empty(shape, dtype=placement.dtype(suffix, autocast) if whole else torch.float32)
        for suffix, shape in placement.slots.items()
    }
    own = {suffix: tensor for suffix, tensor in drawn.items() if suffix != "base_layer.bias"}
    placement.layer_class.initialise(own, placement.base, config)
    if "base_layer.bias" in drawn:
        copy_bias(drawn["base_layer.bias"], placement.base)
    device = device_of(placement.base)
    return {s: t.to(device=device, dtype=placement.dtype(s, autocast)) for s, t in drawn.items()}


def _build(placement: Placement, config: PeftConfig, tensors: Mapping[str, torch.Tensor]) -> Built:
    return Built(placement, placement.layer_class(placement.base, config, placement.path, tensors))
