"""The adapter layer of a method that acts on the call of the network as a whole."""

from __future__ import annotations

from splice.loading.contributors.draft import Draft
from splice.surgery.placement import Placement


def network_layer(draft: Draft) -> None:
    """Place it on the module whose call it acts on.

    Raises:
        ValueError: the network has no such module.
    """
    layer_class = draft.method.network_layer
    if layer_class is None:
        return
    path = layer_class.place(draft.network, draft.config)
    placed = Placement.of(path, draft.modules[path], layer_class, draft.config)
    trained_class = layer_class.for_training(draft.config)
    if trained_class is not layer_class:
        # While it is trained it has more tensors than are needed to use it; a checkpoint may hold them or not.
        trained = Placement.of(path, draft.modules[path], trained_class, draft.config)
        keys = frozenset(trained.keys.values()).difference(placed.keys.values())
        if not draft.config.inference_mode and (draft.is_new or keys <= set(draft.held)):
            placed, keys = trained, frozenset(placed.keys.values()).difference(trained.keys.values())
        draft.redundant |= keys
    draft.placements.append(placed)
    for below, companion in layer_class.companions(draft.modules[path], path).items():
        draft.placements.append(Placement.of(below, draft.modules[below], companion, draft.config))
    # Asked of the network and not of that module: only the network's config knows the sizes.
    draft.resolved.update(layer_class.resolved(draft.network, draft.config))
