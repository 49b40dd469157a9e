"""Making an adapter anew in its place: with other ranks, or on other layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from splice.base.bare import walk_bare
from splice.base.dtypes import HALVES
from splice.checkpoint.tensors import TensorsInMemory
from splice.config import PeftConfig
from splice.errors import UnsupportedFeatureError
from splice.kinds.reading import Checkpoint
from splice.kinds.registry import method_of
from splice.kinds.slot import Role
from splice.loading.commit import build_loaded
from splice.loading.laying_out import lay_out
from splice.loading.plan import Plan, fit
from splice.surgery.placement import Built
from splice.surgery.registering import forget_values
from splice.surgery.tuner import Tuner


def remake(
    tuner: Tuner, name: str, config: PeftConfig, tensors: Mapping[str, torch.Tensor], heads: Sequence[str]
) -> None:
    """Put an adapter with this config and these tensors in the place of the adapter `name`.

    It is active and trainable if the old one is. The tensors are new objects: an optimizer that holds the old ones has to be
    made anew.

    Raises:
        ValueError: there is no such adapter, it is merged, or the tensors are not those of the config.
        UnsupportedFeatureError: it uses layers of the network several times.
    """
    tuner.check_known([name])
    if name in tuner.merged:
        raise ValueError(f"adapter {name!r} is merged; call `unmerge_adapter()` before it is made anew")
    old_config, old_plan, old_layers = tuner.peft_config[name], tuner.plans[name], tuner.placed[name]
    if old_config.layer_ranges() or config.layer_ranges():
        raise UnsupportedFeatureError(
            "an adapter that uses layers several times (`layer_replication`) cannot be made anew"
        )
    assert isinstance(old_plan, Plan)
    held = [item.registry[item.name] for layer in old_layers.values() for item in layer.tensors_by_role(Role.TRAINED)]
    trained = any(tensor.requires_grad for tensor in held)
    checkpoint = Checkpoint(config, TensorsInMemory(tensors, "the given tensors"), {key: key for key in tensors})
    modules = walk_bare(tuner.model)
    plan = fit(lay_out(tuner.model, config, method_of(config), heads, modules), checkpoint)
    if not plan.fits:
        raise ValueError(
            f"the tensors are not those of the config: missing {list(plan.missing)}, left over {list(plan.unexpected)}, of "
            f"other shapes {[wrong.key for wrong in plan.mismatched]}"
        )
    built = build_loaded(plan, config, checkpoint.weights, autocast=all(tensor.dtype not in HALVES for tensor in held))
    before = [Built(place, old_layers[place.path]) for place in (*old_plan.placements, *old_plan.followers)]
    tuner.discard(name, for_good=False)
    try:
        tuner.commit(name, config, built, tuner.is_bare, modules, plan)
    except BaseException:
        if name in tuner.placed:
            tuner.discard(name)
        tuner.commit(name, old_config, before, tuner.is_bare, modules, old_plan)
        raise
    finally:
        tuner.set_requires_grad(name, trained)
    forget_values(entry for layer in old_layers.values() for entry in layer.entries.values())
