"""Loaded is not yet applied: one warning when the first call after a load reached none of the adapted layers."""

from __future__ import annotations

from splice.errors import PeftWarning, warn
from splice.surgery.tuner import Tuner


def warn_if_unused(tuner: Tuner) -> None:
    """Warn where adapters are active and no call has come by any of their layers."""
    if not tuner.selection.enabled or not tuner.selection.active:
        return
    unused = tuner.unused_layers()
    if unused and len(unused) == len(tuner.active_paths()):
        warn(
            f"The active adapter {tuner.active_adapter!r} is loaded and had no effect: the first call reached none of "
            f"its {len(unused)} layers ({unused[0]}, ...). The model may use their weights without calling them, or may "
            "not use this part at all. See `model.unused_layers()`.",
            PeftWarning,
        )
