"""splice under the name `peft`."""

from typing import Any

import splice

__version__ = "0.22.0+splice.1"
__all__ = [name for name in dir(splice) if not name.startswith("_")]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(splice, name)
