"""Which tied layers of the base follow its input embeddings, and are therefore no targets of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable

from splice.base.embeddings import InputEmbeddings, input_embeddings
from splice.checkpoint.patterns import expression
from splice.errors import warn
from splice.kinds.matching import TargetMatcher
from splice.loading.config_fields import field_names, field_value
from splice.loading.contributors.draft import Draft
from splice.loading.tying import EMBEDDING_NAMES, Tying


def ties(draft: Draft) -> None:
    """Work out what follows the input embeddings; of a new adapter, warn of what probably was not meant."""
    if not draft.on_layers:
        return
    rule, embeddings = draft.rule, input_embeddings(draft.network, draft.modules)
    wanted = bool(field_value(draft.config, "ensure_weight_tying"))
    # As in the reference, which looks at layers of these names alone.
    named = [path for path in embeddings.all if path.rpartition(".")[2] in EMBEDDING_NAMES]
    selects, saved = TargetMatcher(rule), tuple(rule.modules_to_save or ())
    targeted = any(selects(path) for path in named)
    whole = bool(saved) and any(path.endswith(saved) for path in named)
    if draft.is_new:
        _warn(embeddings, wanted, targeted or whole, "ensure_weight_tying" in field_names(draft.config))
    if not (wanted and embeddings.tied):
        draft.tied = Tying(embeddings)
        return
    if targeted:
        rule = rule._replace(target_modules=_with_embeddings(rule.target_modules, embeddings))
    if whole:
        kept = [e for e in saved if not (e.rpartition(".")[2] in EMBEDDING_NAMES and _ends(embeddings.tied, e))]
        rule = rule._replace(modules_to_save=list(dict.fromkeys([*kept, embeddings.path])))
    draft.rule, draft.tied = rule, Tying(embeddings, targeted, whole)


def _warn(embeddings: InputEmbeddings, wanted: bool, touched: bool, known: bool) -> None:
    if wanted and not embeddings.tied:
        text = "You have requested `ensure_weight_tying`, but no tied modules were found in the model."
    elif wanted and not touched:
        text = (
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or "
            "`target_modules`."
        )
    elif touched and embeddings.tied and not wanted:
        why = "`ensure_weight_tying` is not set to True" if known else "this method cannot tie its adapter layers"
        text = (
            f"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but {why}. The two ends of "
            f"the tie ({', '.join(embeddings.all)}) will differ once the adapter is trained or merged."
        )
    else:
        return
    warn(text)


def _with_embeddings(targets: set[str] | list[str] | str | None, embeddings: InputEmbeddings) -> set[str] | str:
    """`targets` with the input embeddings in the place of the layers that follow them."""
    # An expression cannot be taken apart: it goes on matching the followers, and `Tying.left_out` keeps those out.
    if isinstance(targets, str):
        known = expression(targets, targets, "target_modules").fullmatch(embeddings.path)
        return targets if known else f"(?:{targets}|^{re.escape(embeddings.path)}$)"
    kept = {entry for entry in targets or () if not _ends(embeddings.tied, entry, dotted=True)}
    return kept | {embeddings.path}


def _ends(paths: Iterable[str], entry: str, dotted: bool = False) -> bool:
    return any(path == entry or path.endswith("." + entry if dotted else entry) for path in paths)
