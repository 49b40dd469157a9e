"""Weights of the base that a checkpoint may hold beside the adapter."""

from __future__ import annotations

from splice.checkpoint.keys import format_key
from splice.loading.contributors.draft import Draft
from splice.loading.tying import EMBEDDING_NAMES


def base_copies(draft: Draft) -> None:
    """Where embeddings are targets, a checkpoint may hold the base's own embeddings."""
    # The reference writes them, so that rows which came with a resized vocabulary are not lost. By name, as it goes by names.
    # A tied layer that follows the embeddings is a target without a layer of its own, and its weight is written as well.
    for placement in (*draft.placements, *draft.followers) if draft.on_layers else ():
        if (
            placement.path.rpartition(".")[2] in EMBEDDING_NAMES
            and placement.base._parameters.get("weight") is not None
        ):
            draft.base_copies[format_key(placement.path, "base_layer.weight")] = placement.base
