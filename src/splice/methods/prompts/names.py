"""Under which names virtual tokens, and modules that are saved whole beside them, stand in the tree and in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from splice.checkpoint.keys import SHORT_PREFIX
from splice.kinds.module_copy import WholeModule
from splice.kinds.names import CopyNames, Names, Place

PROMPT_KEY = "prompt_embeddings"


class PromptHead(WholeModule):
    """A module saved whole beside virtual tokens: the reference names it without `model.`, as they wrap nothing."""

    names = CopyNames("modules_to_save", "original_module.", prefix=SHORT_PREFIX)


@dataclass(frozen=True, eq=False)
class PromptNames(Names):
    """Of virtual tokens: a checkpoint has their table under one name, and all else beside the network's paths."""

    # Nothing is wrapped by them.
    base: str = ""
    # Suffix -> key, where they differ.
    keys: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({"embedding.weight": PROMPT_KEY}))
    # What stands before the suffix of any other tensor in a checkpoint.
    front: str = ""

    def key(self, path: str, suffix: str) -> str:
        return self.keys.get(suffix, self.front + suffix)

    def place(self, suffix: str) -> Place:
        return Place("prompt_encoder", suffix)

    def path_in_tree(self, path: str) -> str:
        return ""

    def path_in_reference(self, path: str) -> str:
        return ""
