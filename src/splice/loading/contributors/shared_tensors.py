"""Tensors that all layers of one adapter use."""

from __future__ import annotations

from splice.kinds.layout import LaidOut
from splice.kinds.shared import SHARED_PATH
from splice.kinds.slot import shapes_of
from splice.loading.contributors.draft import Draft
from splice.loading.plan import Repeated
from splice.surgery.placement import Placement


def shared_tensors(draft: Draft) -> None:
    """Place what holds them before the layers that use them, with the shapes that those need."""
    shared = draft.method.shared
    if shared is None or not draft.placements:
        return
    slots = shared.shared_slots([(p.path, p.base) for p in draft.placements], draft.config)
    # On the device of one of the layers, and in its precision: the last one's, as in the reference.
    layout = draft.layout if issubclass(shared, LaidOut) else None
    held = Placement(SHARED_PATH, draft.placements[-1].base, shared, slots, layout=layout)
    again = shared.written_on_layers.intersection(shapes_of(slots))
    for placement in draft.placements if again else ():
        key = placement.layer_class.names.key
        draft.repeated.update({key(placement.path, suffix): Repeated(held.key(suffix), False) for suffix in again})
    draft.placements.insert(0, held)
