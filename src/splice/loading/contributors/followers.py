"""Adapter layers of tied layers, which share the tensors of the adapter layer on the input embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from splice.base.layers import kind_of
from splice.errors import UnsupportedFeatureError
from splice.kinds.module_copy import WholeModule
from splice.kinds.slot import Leader
from splice.kinds.token_rows import TokenRowsBeside
from splice.loading.contributors.draft import Draft
from splice.loading.plan import repeats
from splice.surgery.placement import Placement


def followers(draft: Draft) -> None:
    """Place them, where tied layers follow; a checkpoint may hold their tensors once more.

    Raises:
        UnsupportedFeatureError: the adapter layers cannot share their tensors.
        TypeError: a tied layer that has to follow is a target of its own.
    """
    method, tied, by_path = draft.method, draft.tied, draft.by_path()
    leader = by_path.get(tied.embeddings.path)
    if leader is None:
        return
    # Rows that take the place of those at one end alone would part the two ends, whatever the config says of ties.
    always = method.follows_ties or leader.layer_class is TokenRowsBeside
    if not (always or (tied.whole if issubclass(leader.layer_class, WholeModule) else tied.targets)):
        return
    for path in tied.embeddings.tied:
        own = by_path.get(path)
        if own is not None and (own.layer_class is leader.layer_class or method.follows_ties):
            continue  # it was named itself, and has tensors of its own
        if own is not None:
            raise TypeError(
                f"{path!r} shares its weight with {leader.path!r}, whose rows are trained, and is adapted in another way "
                "itself by the same adapter. Choose one of the two."
            )
        follower = _follower(path, draft.modules[path], leader, draft)
        draft.followers.append(follower)
        draft.repeated.update(repeats(follower, by_path))


def _follower(path: str, base: nn.Module, leader: Placement, draft: Draft) -> Placement:
    cls, method, config = leader.layer_class, draft.method, draft.config
    if not (issubclass(cls, WholeModule) or leader.own_config is not None or method.follows_ties):
        # The input embeddings and the output layer are of different kinds, so the method has another layer for it.
        kind = kind_of(base)
        cls = method.layer_for(base, path, config)
        if cls.divides or (
            method.variant is not None and kind is not None and method.variant(config, kind, base) is not None
        ):
            raise UnsupportedFeatureError(
                f"`ensure_weight_tying` is not supported for {cls.__name__} ({path!r}). Leave {path!r} out of the targets, "
                "or set it to False."
            )
    own = leader.own_config
    slots = cls.slots(base, own or config, path)
    turned: Mapping[str, str] = {} if cls is leader.layer_class else cls.transposes
    leaders = {suffix: Leader(leader.path, turned.get(suffix, suffix), suffix in turned) for suffix in slots}
    return Placement(path, base, cls, slots, own, leaders)
