"""Questions to objects of other libraries by the name of an attribute; `foreign_models.py` has one function for each."""

from __future__ import annotations

from typing import Any

from splice.base.foreign_models import accepted_by as accepted_by


def asked(holder: Any, name: str, default: Any = None) -> Any:
    """The attribute `name` of a base model, layer, config or output, or `default` where it has none."""
    return getattr(holder, name, default)
