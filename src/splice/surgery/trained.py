"""Which adapters are in training: the flags of their tensors, changed without a look at those of all other adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from splice.kinds.layer import AdapterLayer
from splice.kinds.slot import Role
from splice.kinds.tensors import Registered


class Trained:
    """The flags of the adapters on one network.

    Args:
        placed: for each adapter its adapter layers, by path; seen as it is at any time.
    """

    def __init__(self, placed: Mapping[str, Mapping[str, AdapterLayer]]) -> None:
        self.placed = placed
        # Adapters whose tensors may require grad: a switch need not look at the flags of all others.
        self.names: set[str] = set()
        # For each adapter that was ever switched, where its trained tensors are registered.
        self._places: dict[str, list[Registered]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def all_but(self, names: Collection[str]) -> set[str]:
        """Those in training whose names are not among these."""
        return self.names.difference(names)

    def suspect_all(self) -> None:
        """Take any of them for trainable, after flags were changed on some layer alone."""
        self.names = set(self.placed)

    def set(self, name: str, requires_grad: bool) -> None:
        """Whether the tensors of this adapter are trained."""
        (self.names.add if requires_grad else self.names.discard)(name)
        for registry, key, _ in self._places_of(name):
            try:
                registry[key].requires_grad = requires_grad
            except RuntimeError:
                # No leaf (under FSDP) or no float. Asking each one first would double the time of a switch.
                continue

    def moved(self, name: str) -> None:
        """Look anew for where this adapter's tensors are, the next time."""
        self._places.pop(name, None)

    def forget(self, name: str) -> None:
        """Know nothing of this adapter."""
        self.names.discard(name)
        self._places.pop(name, None)

    def _places_of(self, name: str) -> Iterable[Registered]:
        """Where the adapter's trained tensors are registered: places stay when the parameters in them are replaced."""
        found = self._places.get(name)
        if found is None:
            layers = self.placed[name].values()
            found = self._places[name] = [item for layer in layers for item in layer.tensors_by_role(Role.TRAINED)]
        return found
