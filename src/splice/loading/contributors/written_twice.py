"""Biases that the reference writes a second time."""

from __future__ import annotations

from splice.checkpoint.keys import format_key
from splice.kinds.module_copy import SavedModule
from splice.loading.contributors.draft import Draft


def written_twice(draft: Draft) -> None:
    """With `bias="all"` it also writes the biases of modules that are saved whole, under their names in its memory."""
    if draft.config.trained_biases() != "all":
        return
    whole = [(p.path, suffix) for p in draft.placements if p.layer_class is SavedModule for suffix in p.slots]
    draft.redundant |= {
        format_key(path, f"{where}.{suffix}")
        for path, suffix in whole
        if suffix.rpartition(".")[2] == "bias"
        for where in ("modules_to_save", "original_module")
    }
