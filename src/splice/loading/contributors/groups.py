"""Tensors that some layers of one adapter share with one another: in each group the first layer has it, the others follow."""

from __future__ import annotations

from dataclasses import replace

from splice.config import copy_config
from splice.kinds.slot import Leader
from splice.loading.contributors.draft import Draft
from splice.loading.plan import repeats


def groups(draft: Draft) -> None:
    """Let layers share what their method says; a checkpoint may hold it once more for each of them."""
    if draft.method.groups is None:
        return
    own = [p for p in draft.placements if p.layer_class is not draft.method.shared]
    # By the targets as they are spelled out now, and not by what stands for them in the config.
    config = copy_config(draft.config, target_modules=draft.rule.target_modules)
    found = draft.method.groups([(p.path, p.base) for p in own], config)
    by_path = draft.by_path()
    for index, placement in enumerate(draft.placements):
        leaders = {suffix: Leader(path, suffix) for suffix, path in found.get(placement.path, {}).items()}
        if leaders:
            draft.placements[index] = following = replace(placement, leaders=leaders)
            draft.repeated.update(repeats(following, by_path))
