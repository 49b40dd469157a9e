"""The layers of the base that the config selects."""

from __future__ import annotations

from torch import nn

from splice.base.layers import kind_of
from splice.errors import UnsupportedLayerError, counted, warn
from splice.kinds.layout import LaidOut, Layout
from splice.loading.contributors.draft import Draft
from splice.loading.targets import say_what_selects_nothing, select


def targets(draft: Draft) -> None:
    """Place the method's adapter layer on each of them, and on the layers that one adapts along with itself.

    Raises:
        NoMatchingPeftModuleError: there is none.
        UnsupportedLayerError: the method cannot be put on one of them, or two of them contain one another.
    """
    if not draft.on_layers:
        return
    selected = select(draft.rule, draft.modules)
    if draft.is_new:
        say_what_selects_nothing(draft.rule, draft.modules, selected)
    for path in draft.tied.left_out:
        selected.pop(path, None)
    if draft.method.passes_over:
        selected = _able(draft, selected)
    own = (*draft.method.layers.values(), draft.method.other_layer, draft.method.shared)
    if any(layer_class is not None and issubclass(layer_class, LaidOut) for layer_class in own):
        draft.layout = Layout(selected, draft.network)
    for path, base in selected.items():
        layer_class = draft.method.layer_for(base, path, draft.config)
        draft.place(path, base, layer_class)
        for below, companion in layer_class.companions(base, path).items():
            # Only the method knows what it adapts along with a layer, so the selection could not refuse this.
            if below in selected:
                raise UnsupportedLayerError(
                    f"{below!r} is selected, and so is {path!r}, which adapts it along with itself. Exclude one of them "
                    "with `exclude_modules`."
                )
            draft.place(below, base.get_submodule(below[len(path) + 1 :]), companion)


def _able(draft: Draft, selected: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that the method can be put on; all of them, for the error that it brings, where that is none."""
    able = {path: base for path, base in selected.items() if kind_of(base) in draft.method.layers}
    others = [path for path in selected if path not in able]
    if others and able and draft.is_new:
        warn(
            f"{draft.method.name.value} cannot be put on {counted(len(others), 'target')} ({', '.join(others[:3])}), and "
            "leaves them as they are."
        )
    return able or selected
