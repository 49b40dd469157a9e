"""How the tensors of an adapter layer are called: by their keys in a checkpoint, and on the adapted layer in memory.

In a checkpoint a tensor has a suffix behind its layer's path (`lora_A.weight`). In memory it stands in a container for its
name, with one entry for each adapter (`lora_A.default.weight`). The adapter's name is the only difference between the two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from typing import ClassVar, NamedTuple

from splice.checkpoint.keys import PREFIX, SHORT_PREFIX, format_key

# The suffix of a bias of a target that an adapter trains. The base keeps its own; since only one adapter of a model can train
# biases, this one has no adapter's name in it.
BIAS = "base_layer.bias"


class Place(NamedTuple):
    """Where a tensor stands on an adapted layer: in which container, and where in the adapter's entry there."""

    # Dotted where the container is inside another module (`token_adapter.trainable_tokens_delta`).
    container: str
    # Empty where the entry is the tensor itself.
    leaf: str


# Kept: all layers of an adapter ask for the same few.
@lru_cache(maxsize=1024)
def _first_and_rest(suffix: str) -> Place:
    container, _, leaf = suffix.partition(".")
    return Place(container, leaf)


class Names(ABC):
    """The names of one class of adapter layers."""

    # What the reference puts before the names of the base's own tensors, once such a layer is on it.
    base: str
    # Whether the tensors stand on the layer above the target, which the adapter is on as well.
    above: ClassVar[bool] = False

    @abstractmethod
    def key(self, path: str, suffix: str) -> str:
        """The name of a tensor in the checkpoint, of the layer at `path`."""

    @abstractmethod
    def place(self, suffix: str) -> Place:
        """Where the tensor stands in memory."""

    def path_in_reference(self, path: str) -> str:
        """What stands before the tensors' names in the reference's memory, with a dot at its end unless it is empty."""
        return format_key(path, "")

    def nameless(self, suffix: str) -> str | None:
        """Where a tensor stands on the layer that has no adapter's name in its own, dotted; None of all others."""
        return BIAS if suffix == BIAS else None

    def is_on_layer(self, suffix: str, adapter_name: str) -> bool:
        """Whether the tensor of this adapter is a parameter of the layer itself, which has none of that name."""
        return False

    def path_in_tree(self, path: str) -> str:
        """What stands before the tensors' names in the tree of modules, likewise."""
        return format_key(path, "")

    def in_tree(self, path: str, suffix: str, adapter_name: str) -> str:
        """The name of the tensor in the tree of modules, seen from the PeftModel."""
        return self.path_in_tree(path) + self.on_layer(suffix, adapter_name)

    def in_reference(self, path: str, suffix: str, adapter_name: str) -> str:
        """How the reference calls the tensor in memory: as the tree does, but for what it puts before base tensors."""
        return self.path_in_reference(path) + self.on_layer(suffix, adapter_name)

    def on_layer(self, suffix: str, adapter_name: str) -> str:
        """The name of the tensor in the tree of modules, seen from the layer."""
        nameless = self.nameless(suffix)
        if nameless is not None:
            return nameless
        if self.is_on_layer(suffix, adapter_name):
            return suffix
        container, leaf = self.place(suffix)
        return ".".join(filter(None, (container, adapter_name, leaf)))

    def base_in_reference(self, path: str) -> str:
        """What the reference puts before the names of the base's own tensors, seen from the PeftModel."""
        return self.path_in_reference(path) + self.base


class LayerNames(Names):
    """Of layers whose tensors stand behind the layer's path: those of nearly all methods."""

    base = "base_layer."

    def __init__(self, base: str | None = None, places: Mapping[str, Place] | None = None) -> None:
        """With names of its own.

        Args:
            base: see `Names`; empty where the reference leaves the base's names alone, None for what it mostly is.
            places: suffix -> its place, where that is not the first component of the suffix and the rest of it.
        """
        if base is not None:
            self.base = base
        # A plain dict by default: layers that have names of their own are copied and pickled with them.
        self.places = {} if places is None else places

    def key(self, path: str, suffix: str) -> str:
        return format_key(path, suffix)

    def place(self, suffix: str) -> Place:
        known = self.places.get(suffix)
        if known is not None:
            return known
        return _first_and_rest(suffix)


class CopyNames(Names):
    """Of copies of whole modules: the module's own names, in one container."""

    def __init__(self, container: str, base: str, front: str = "", prefix: str = PREFIX) -> None:
        """With these names.

        Args:
            container: `modules_to_save` and the like.
            base: see `Names`.
            front: what stands before the module's own names in a checkpoint; empty for nothing.
            prefix: what stands before the path: all of the grammar's prefix, or the half of it where nothing is wrapped.
        """
        self.container, self.base, self.front, self.prefix = container, base, front, prefix

    def key(self, path: str, suffix: str) -> str:
        return f"{self.prefix}{path}.{suffix}"

    def place(self, suffix: str) -> Place:
        return Place(self.container, suffix.removeprefix(self.front))

    def path_in_reference(self, path: str) -> str:
        return f"{self.prefix}{path}."


class SharedNames(Names):
    """Of tensors that all layers of an adapter share: they stand behind no path."""

    # See `Names`: nothing of the base is renamed by them.
    base = ""

    def key(self, path: str, suffix: str) -> str:
        return SHORT_PREFIX + suffix

    def place(self, suffix: str) -> Place:
        return _first_and_rest(suffix)

    def path_in_reference(self, path: str) -> str:
        return SHORT_PREFIX

    def path_in_tree(self, path: str) -> str:
        return SHORT_PREFIX


class SharedInContainersNames(SharedNames):
    """The same, where the whole of a name is that of a container, inside one for all of its first component."""

    def place(self, suffix: str) -> Place:
        return Place(suffix, "")
