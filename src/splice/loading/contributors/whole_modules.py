"""Modules that the adapter holds a trained copy of (`modules_to_save`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from splice.config import TargetRule
from splice.kinds.module_copy import SavedModule
from splice.loading.contributors.draft import Draft
from splice.surgery.placement import Placement


def whole_modules(draft: Draft) -> None:
    """Place a copy of each of them.

    Raises:
        TypeError: one of them is a target of the same adapter, or holds one.
    """
    found = _saved_whole(draft.rule, draft.modules)
    _check_apart(found, draft.placements)
    network_layer = draft.method.network_layer
    layer_class = SavedModule if network_layer is None else network_layer.head
    for path, base in found:
        draft.place(path, base, layer_class)


def _saved_whole(rule: TargetRule, modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    entries = tuple(rule.modules_to_save or ())
    found: list[tuple[str, nn.Module]] = []
    for path, module in modules.items() if entries else ():
        # The reference compares plain suffixes here, without regard to dots.
        inside = found and path.startswith(found[-1][0] + ".")
        if path and path.endswith(entries) and not inside:
            found.append((path, module))
    return found


def _check_apart(whole: Sequence[tuple[str, nn.Module]], targets: Sequence[Placement]) -> None:
    """Raise where a module that is saved whole is a target of the same adapter, or holds one."""
    for path, module in whole:
        inside = [p.path for p in targets if p.path == path or p.path.startswith(path + ".")]
        if inside:
            raise TypeError(
                f"modules_to_save cannot be applied to {path!r} (a {type(module).__name__}): {inside[0]!r} is a target of "
                "the same adapter. Its names are plain suffixes; write them out as far as they are meant."
            )
