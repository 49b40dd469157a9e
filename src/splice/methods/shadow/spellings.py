"""Files whose names lack the word that stands for an adapter's name in those of SHADOW, or hold that name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from splice.kinds.reading import Checkpoint, Reading
from splice.methods.shadow.config import ShadowConfig
from splice.methods.shadow.names import MARK

# What the word stands behind, and what may follow it.
TENSORS = frozenset(
    {
        "shadow_down",
        "shadow_up",
        "shadow_update_transform",
        "shadow_update_gate",
        "shadow_backbone",
        "shadow_projection",
        "shadow_head",
    }
)
_ON_BLOCKS = ("shadow_down", "shadow_up", "shadow_update_transform", "shadow_update_gate", "shadow_projection")
_FIRST = ("weight", "0", "2")


def read_without_mark(
    checkpoint: Checkpoint, config: ShadowConfig, network: nn.Module, modules: Mapping[str, nn.Module]
) -> Reading | None:
    """The checkpoint with the word in all names; None where it is there already, or the names cannot be told apart."""
    word = _word_in(checkpoint.names)
    if word is None or word == MARK.strip("."):
        return None
    names = {_marked(name, word): own for name, own in checkpoint.names.items()}
    note = f"the names hold {word!r} as an adapter's name" if word else "the names hold no adapter's name"
    return Reading(
        checkpoint._replace(names=names), config, (f"{note}: read as those of the reference, with 'default'",)
    )


def _word_in(names: Collection[str]) -> str | None:
    """What stands where an adapter's name does; empty for nothing, None where that cannot be told."""
    found = set()
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part in _ON_BLOCKS), None)
        if at is not None:
            behind = parts[at + 1 :]
            start = next((i for i, part in enumerate(behind) if part in _FIRST), len(behind))
            found.add(".".join(behind[:start]))
    return found.pop() if len(found) == 1 else None


def _marked(name: str, word: str) -> str:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part in TENSORS), None)
    if at is None:
        return name
    rest = parts[at + 1 + (len(word.split(".")) if word else 0) :]
    return ".".join([*parts[: at + 1], MARK.strip("."), *rest])
