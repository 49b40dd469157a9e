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
    # While it is trained it may have more tensors than a checkpoint holds; a load brings those of the checkpoint.
    if draft.is_new and not draft.config.inference_mode:
        layer_class = layer_class.for_training(draft.config)
    draft.placements.append(Placement.of(path, draft.modules[path], layer_class, draft.config))
    # Asked of the network and not of that module: only the network's config knows the sizes.
    draft.resolved.update(layer_class.resolved(draft.network, draft.config))
