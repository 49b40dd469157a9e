"""Layers that get tokens which the network has sorted: the experts of mixture-of-experts models.

What such a layer is given are the tokens that a router chose for it, in an order of their own. Neither the row of the batch
nor the position that each of them came from can be told there.
"""

from __future__ import annotations

from functools import lru_cache


# Asked at every call of a layer; a path says the same each time.
@lru_cache(maxsize=1 << 16)
def gets_sorted_tokens(path: str, class_name: str = "") -> bool:
    """Whether the layer at `path` is one of several experts or inside one; its class's name may tell as well."""
    # In some models the layers of all experts are one, and its input is what the module around it has sorted.
    if class_name.endswith("ParallelExperts"):
        return True
    # By name: all models of transformers, and those of others that we know, call them so. What is behind a router looks
    # like any other layer, and counts that happen to agree prove nothing.
    *parts, last = path.lower().split(".")
    # The module that holds all experts gets all tokens in their order, and sorts them itself.
    parts += [] if last == "experts" else [last]
    inside = False
    for part in parts:
        if "expert" in part:
            # Experts that all tokens go to are layers like any other, and so is what chooses one.
            inside = not any(word in part for word in ("shared", "gate", "router"))
        elif "router" in part:
            inside = False
    return inside
