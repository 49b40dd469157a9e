"""Layers that get tokens which the network has sorted: the experts of mixture-of-experts models.

What such a layer is given are the tokens that a router chose for it, in an order of their own. Neither the row of the batch
nor the position that each of them came from can be told there.
"""

from __future__ import annotations


def gets_sorted_tokens(path: str) -> bool:
    """Whether the layer at `path` is, or is inside, one of several experts."""
    # By name: all models of transformers, and those of others that we know, call them so. What is behind a router looks
    # like any other layer, and counts that happen to agree prove nothing.
    *parts, last = path.split(".")
    return any(_is_expert(part) for part in parts) or (_is_expert(last) and not _chooses(last))


def _is_expert(part: str) -> bool:
    # Experts that all tokens go to are layers like any other.
    return "expert" in part.lower() and "shared" not in part.lower()


def _chooses(name: str) -> bool:
    """Whether a layer of this name is a router, which gets all tokens (`expert_gate`)."""
    return "gate" in name.lower() or "router" in name.lower()
