"""Questions to objects of other libraries: what some models, layers and configs have, and others have never heard of.

Objects of our own are never asked so: what they can do stands in their class or in their method's record.
"""

from __future__ import annotations

import inspect
from typing import Any


def asked(holder: Any, name: str, default: Any = None) -> Any:
    """The attribute `name` of a base model, layer, config or output, or `default` where it has none."""
    return getattr(holder, name, default)


def accepted_by(function: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Those of `options` that `function` has parameters for."""
    parameters = inspect.signature(function).parameters
    return {k: v for k, v in options.items() if k in parameters}
