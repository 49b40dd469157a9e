"""`peft.tuners`."""

from typing import Any

import splice


def __getattr__(name: str) -> Any:
    if not name.endswith("Config"):
        raise AttributeError(f"module 'peft.tuners' has no attribute {name!r}")
    return getattr(splice, name)
