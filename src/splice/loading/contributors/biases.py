"""Biases of the base that the adapter trains (`bias`)."""

from __future__ import annotations

from dataclasses import replace

from splice.config import PeftConfig
from splice.kinds.module_copy import SavedModule
from splice.kinds.names import BIAS
from splice.kinds.trained_bias import BiasOnly, bias_slot
from splice.loading.contributors.draft import Draft
from splice.surgery.placement import Placement


def biases(draft: Draft) -> None:
    """Give the adapter's layers a slot for their bias, and with "all" place a layer on every other module with one."""
    which = draft.config.trained_biases()
    if which == "none":
        return
    whole = tuple(p.path for p in draft.placements if p.layer_class is SavedModule)
    adapted = draft.by_path()
    # What all layers share stands on no module.
    result = [placement for placement in draft.placements if placement.path not in draft.modules]
    # In the order of the model: biases are its own parameters, and the reference names them as it meets them.
    for path, module in draft.modules.items():
        placement = adapted.get(path)
        own = module._parameters.get("bias")
        inside_whole = any(path == w or path.startswith(w + ".") for w in whole)
        if own is None or inside_whole:
            if placement is not None:
                result.append(placement)
        elif placement is not None:
            bias = {BIAS: bias_slot(module)}
            in_file = None if placement.in_file is None else {**placement.in_file, **bias}
            result.append(replace(placement, slots={**placement.slots, **bias}, in_file=in_file))
        elif which == "all":
            # With a config that says nothing: a bias is a bias, whatever the method.
            result.append(Placement.of(path, module, BiasOnly, PeftConfig()))
    draft.placements = result
