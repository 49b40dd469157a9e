"""Tensors of modules that are saved whole, which the reference may write a second time."""

from __future__ import annotations

from splice.checkpoint.keys import format_key
from splice.kinds.module_copy import SavedModule
from splice.loading.contributors.draft import Draft
from splice.loading.plan import Repeated


def written_twice(draft: Draft) -> None:
    """It writes them under their names in its memory, too: biases with `bias="all"`, all with the base's embeddings."""
    all_biases = draft.config.trained_biases() == "all"
    leaders = {p.path: p for p in draft.placements}
    for placement in (*draft.placements, *draft.followers):
        if placement.layer_class is not SavedModule:
            continue
        path, owner = placement.path, leaders[placement.leader] if placement.leader else placement
        for suffix in placement.slots:
            again = format_key(path, f"modules_to_save.{suffix}")
            if all_biases and suffix.rpartition(".")[2] == "bias":
                draft.redundant |= {again, format_key(path, f"original_module.{suffix}")}
            else:
                draft.repeated[again] = Repeated(owner.key(suffix), transposed=False)
