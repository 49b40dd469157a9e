"""Whether the layers of an adapter get the rows of a batch in their order, as a mixed batch needs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from splice.base.routing import gets_sorted_tokens
from splice.surgery.adapted_layer import Adapted


class InOrder:
    """What was found out about the adapters on one network; each is looked at once."""

    def __init__(self) -> None:
        # For each adapter that was ever in a mixed batch, its first layer that gets sorted tokens; empty for none.
        self._sorted: dict[str, str] = {}

    def forget(self, name: str) -> None:
        """Know nothing of this adapter."""
        self._sorted.pop(name, None)

    def check(
        self, names: Iterable[str], placed: Mapping[str, Collection[str]], adapted: Mapping[str, Adapted]
    ) -> None:
        """Raise where a layer of these adapters gets tokens whose rows nobody can tell.

        Args:
            names: of the adapters.
            placed: for each adapter the paths of its adapter layers.
            adapted: the adapted layers by path.

        Raises:
            ValueError: an adapter is in experts.
        """
        for name in dict.fromkeys(names):
            if name not in self._sorted:
                hosts = ((path, adapted[path].splice_host) for path in placed.get(name, ()) if path in adapted)
                self._sorted[name] = next((p for p, host in hosts if gets_sorted_tokens(p, host.original.__name__)), "")
            path = self._sorted[name]
            if path:
                raise ValueError(
                    f"Cannot pass different `adapter_names` with the adapter {name!r}: its layer {path!r} is inside an "
                    "expert, which gets tokens that were sorted, and to which row each belongs cannot be told there. Call "
                    "the model once for each adapter, or train without target modules in experts."
                )
