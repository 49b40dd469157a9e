"""Rows of single tokens that an adapter trains beside the layers of its method (`trainable_token_indices`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import nn

from splice.base.embeddings import InputEmbeddings
from splice.kinds.module_copy import WholeModule
from splice.kinds.token_rows import RowsConfig, TokenRowsBeside
from splice.loading.config_fields import field_value
from splice.loading.contributors.draft import Draft
from splice.surgery.placement import Placement

# As the config has them: which rows of the input embeddings, or of each layer that is named.
TokenIndices = Sequence[int] | Mapping[str, Sequence[int]]


def token_rows(draft: Draft) -> None:
    """Place an adapter layer on every layer with such rows.

    Raises:
        ValueError: a named layer does not exist, is saved whole too, or tied layers are to have different rows.
        TypeError: a named layer is a target of the same adapter.
    """
    # Whatever else a caller may have written there, the layer refuses when it checks the numbers.
    given = cast("TokenIndices | None", field_value(draft.config, "trainable_token_indices"))
    if not given:
        return
    taken = draft.by_path()
    for path, rows in _apart(_by_path(given, draft.tied.embeddings, draft.modules), draft).items():
        if path in taken:
            _refuse_beside(path, taken[path])
        own = RowsConfig(token_indices=list(rows))
        draft.placements.append(Placement.of(path, draft.modules[path], TokenRowsBeside, draft.config, own))


def _apart(indices: dict[str, Sequence[int]], draft: Draft) -> dict[str, Sequence[int]]:
    """`indices` without the tied layers that have the rows of the input embeddings, and follow those."""
    embeddings = draft.tied.embeddings
    both = {path: rows for path, rows in indices.items() if path in embeddings.all}
    if len({tuple(rows) for rows in both.values()}) > 1:
        if field_value(draft.config, "ensure_weight_tying"):
            raise ValueError(
                f"Cannot ensure weight tying when different token indices are specified for tied layers: {both}. "
                "Use the same indices for all tied layers or set ensure_weight_tying=False."
            )
        return indices
    if embeddings.path not in both:
        return indices
    return {path: rows for path, rows in indices.items() if path not in embeddings.tied}


def _by_path(
    given: TokenIndices, embeddings: InputEmbeddings, modules: Mapping[str, nn.Module]
) -> dict[str, Sequence[int]]:
    if not isinstance(given, Mapping):
        if embeddings.path:
            return {embeddings.path: given}
        given = {"embed_tokens": given}
    found: dict[str, Sequence[int]] = {}
    for name, rows in given.items():
        paths = [path for path in modules if path and path.endswith(name)]
        if not paths:
            raise ValueError(
                f"trainable_token_indices: there is no module {name!r} in the base model. Please check the name, or name the "
                "input embeddings: `{'<module>': [...]}`."
            )
        found.update({path: list(rows) for path in paths})
    return found


def _refuse_beside(path: str, taken: Placement) -> None:
    if issubclass(taken.layer_class, WholeModule):
        raise ValueError(
            f"{path!r} is already marked to be trained fully (modules_to_save), and trainable_token_indices name it as well. "
            "Specify one of the two."
        )
    raise TypeError(
        f"trainable_token_indices cannot be applied to {path!r}, which is a target of the same adapter ("
        f"{taken.layer_class.__name__}). Leave it out of one of the two."
    )
