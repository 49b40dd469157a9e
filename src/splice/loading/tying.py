"""What a plan adds where layers of the base share the weight of its input embeddings, and rows of single tokens.

A tied layer may *follow* the input embeddings: its adapter layer shares the tensors of theirs, so that the two ends stay
one. It does where the config says so (`ensure_weight_tying`), and always where rows of single tokens are trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import nn

from splice.base.embeddings import InputEmbeddings, input_embeddings
from splice.base.layers import kind_of
from splice.config import PeftConfig, TargetRule
from splice.errors import UnsupportedFeatureError, warn
from splice.kinds.layer import AdapterLayer
from splice.kinds.matching import TargetMatcher
from splice.kinds.module_copy import WholeModule
from splice.kinds.registry import Method
from splice.kinds.token_rows import RowsConfig, TokenRowsBeside
from splice.surgery.placement import Placement

# What the reference calls embeddings when it decides what to tie and what to save.
EMBEDDING_NAMES = ("embed_tokens", "lm_head")


class Repeated(NamedTuple):
    """The key of the tensor that another one of the checkpoint repeats, as it is or transposed."""

    key: str
    transposed: bool


@dataclass(frozen=True)
class Tying:
    """What the tied layers of a base mean for one adapter.

    Attributes:
        rule: what the config selects, the input embeddings in the place of layers that follow them.
        embeddings: the input embeddings of the base.
        targets: whether tied layers follow the method's own layer on the input embeddings.
        whole: whether they follow the copy of the input embeddings (`modules_to_save`).
    """

    rule: TargetRule
    embeddings: InputEmbeddings = field(default_factory=InputEmbeddings)
    targets: bool = False
    whole: bool = False

    @property
    def left_out(self) -> tuple[str, ...]:
        """Layers that are no targets of their own."""
        return self.embeddings.tied if self.targets else ()


def tying(
    rule: TargetRule, config: PeftConfig, network: nn.Module, modules: Mapping[str, nn.Module], new: bool
) -> Tying:
    """Work out what follows the input embeddings; of a `new` adapter, warn of what probably was not meant."""
    embeddings = input_embeddings(network, modules)
    fields = vars(config)
    wanted = bool(fields.get("ensure_weight_tying"))
    named = [path for path in embeddings.all if path.rpartition(".")[2] in EMBEDDING_NAMES]
    selects, saved = TargetMatcher(rule), tuple(rule.modules_to_save or ())
    targeted = any(selects(path) for path in named)
    whole = bool(saved) and any(path.endswith(saved) for path in named)
    if new:
        _warn(embeddings, wanted, targeted or whole, "ensure_weight_tying" in fields)
    if not (wanted and embeddings.tied):
        return Tying(rule, embeddings)
    if targeted:
        rule = replace(rule, target_modules=_with_embeddings(rule.target_modules, embeddings))
    if whole:
        kept = [e for e in saved if not (e.rpartition(".")[2] in EMBEDDING_NAMES and _ends(embeddings.tied, e))]
        rule = replace(rule, modules_to_save=list(dict.fromkeys([*kept, embeddings.path])))
    return Tying(rule, embeddings, targeted, whole)


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


def _with_embeddings(targets: Any, embeddings: InputEmbeddings) -> Any:
    if isinstance(targets, str):
        known = re.fullmatch(targets, embeddings.path)
        return targets if known else f"(?:{targets}|^{re.escape(embeddings.path)}$)"
    kept = {entry for entry in targets if not _ends(embeddings.tied, entry, dotted=True)}
    return kept | {embeddings.path}


def _ends(paths: Iterable[str], entry: str, dotted: bool = False) -> bool:
    return any(path == entry or path.endswith("." + entry if dotted else entry) for path in paths)


def followers(
    tied: Tying, method: Method, config: PeftConfig, placements: Sequence[Placement], modules: Mapping[str, nn.Module]
) -> list[Placement]:
    """The adapter layers of tied layers that share the tensors of those in `placements`.

    Raises:
        UnsupportedFeatureError: the adapter layers cannot share their tensors.
        TypeError: a tied layer that has to follow is a target of its own.
    """
    by_path = {p.path: p for p in placements}
    leader = by_path.get(tied.embeddings.path)
    if leader is None:
        return []
    always = method.follows_ties or leader.layer_class is TokenRowsBeside
    if not (always or (tied.whole if issubclass(leader.layer_class, WholeModule) else tied.targets)):
        return []
    found = []
    for path in tied.embeddings.tied:
        own = by_path.get(path)
        if own is not None and (own.layer_class is leader.layer_class or method.follows_ties):
            continue
        if own is not None:
            raise TypeError(
                f"{path!r} shares its weight with {leader.path!r}, whose rows are trained, and is adapted in another way "
                "itself by the same adapter. Choose one of the two."
            )
        found.append(_follower(path, modules[path], leader, method, config))
    return found


def _follower(path: str, base: nn.Module, leader: Placement, method: Method, config: PeftConfig) -> Placement:
    cls = leader.layer_class
    if not (issubclass(cls, WholeModule) or leader.own_config is not None or method.follows_ties):
        kind = kind_of(base)
        cls = method.layer_for(base, path, config)
        if method.variant is not None and kind is not None and method.variant(config, kind) is not None:
            raise UnsupportedFeatureError(
                f"`ensure_weight_tying` is not supported for {cls.__name__} ({path!r}). Leave {path!r} out of the targets, "
                "or set it to False."
            )
    own = leader.own_config
    return Placement(path, base, cls, cls.slots(base, own or config, path), own_config=own, leader=leader.path)


def repeated_keys(followers: Iterable[Placement], placements: Iterable[Placement]) -> dict[str, Repeated]:
    """Where a checkpoint may hold the tensors of followers, which are those of the layers they follow."""
    by_path = {p.path: p for p in placements}
    found = {}
    for follower in followers:
        leader = by_path[follower.leader]
        if follower.layer_class is TokenRowsBeside:  # never in a file
            continue
        names: Mapping[str, str] = follower.layer_class.transposes if _transposed(follower, leader) else {}
        for suffix in follower.slots:
            of = names.get(suffix, suffix)
            found[follower.key(suffix)] = Repeated(leader.key(of), suffix in names)
    return found


def _transposed(follower: Placement, leader: Placement) -> bool:
    return follower.layer_class is not leader.layer_class


def tensors_for(cls: type[AdapterLayer], leader: AdapterLayer) -> dict[str, Any]:
    """The tensors of a follower of this class: the very parameters of its leader, or views of them."""
    own = dict(leader.named_slots())
    if cls is type(leader):
        return own
    return {
        suffix: nn.Parameter(own[of].detach().T, requires_grad=own[of].requires_grad)
        for suffix, of in cls.transposes.items()
    }


def token_rows(
    config: PeftConfig, embeddings: InputEmbeddings, modules: Mapping[str, nn.Module], others: Sequence[Placement]
) -> list[Placement]:
    """The rows of single tokens that the adapter has beside the layers of its method (`trainable_token_indices`).

    Raises:
        ValueError: a named layer does not exist, is saved whole too, or tied layers are to have different rows.
        TypeError: a named layer is a target of the same adapter.
    """
    asked = vars(config).get("trainable_token_indices")
    if not asked:
        return []
    indices = _by_path(asked, embeddings, modules)
    both = {path: value for path, value in indices.items() if path in embeddings.all}
    if len({tuple(value) for value in both.values()}) > 1:
        if vars(config).get("ensure_weight_tying"):
            raise ValueError(
                f"Cannot ensure weight tying when different token indices are specified for tied layers: {both}. "
                "Use the same indices for all tied layers or set ensure_weight_tying=False."
            )
    elif embeddings.path in both:  # the tied ones follow
        indices = {path: value for path, value in indices.items() if path not in embeddings.tied}
    taken = {p.path: p for p in others}
    for path in indices:
        if path in taken:
            _refuse_beside(path, taken[path])
    return [
        Placement.of(path, modules[path], TokenRowsBeside, config, RowsConfig(token_indices=list(value)))
        for path, value in indices.items()
    ]


def _by_path(asked: Any, embeddings: InputEmbeddings, modules: Mapping[str, nn.Module]) -> dict[str, list[int]]:
    if not isinstance(asked, Mapping):
        if embeddings.path:
            return {embeddings.path: asked}
        asked = {"embed_tokens": asked}
    found = {}
    for name, value in asked.items():
        paths = [path for path in modules if path and path.endswith(name)]
        if not paths:
            raise ValueError(
                f"trainable_token_indices: there is no module {name!r} in the base model. Please check the name, or name the "
                "input embeddings: `{'<module>': [...]}`."
            )
        found.update({path: list(value) for path in paths})
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
