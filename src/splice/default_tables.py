"""The tables by which methods choose targets where a config names none, as `TRANSFORMERS_MODELS_TO_<METHOD>_..._MAPPING`.

They are the records' own: a new entry counts from then on.
"""

from __future__ import annotations

from functools import cache

from splice.checkpoint.types import PeftType
from splice.kinds.registry import all_methods

# The reference has it for caches of transformers before version 4.36, and leaves it empty since.
POSTPROCESS_TABLE = "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING"


def table_prefix(name: PeftType) -> str:
    """What the names of a method's tables begin with."""
    return f"TRANSFORMERS_MODELS_TO_{name.value.replace('_', '')}_"


@cache
def default_tables() -> dict[str, object]:
    """Every table by its name: `model_type` -> names of modules."""
    found: dict[str, object] = {POSTPROCESS_TABLE: {}}
    for name, method in all_methods().items():
        front = table_prefix(name)
        if method.default_targets:
            found[f"{front}TARGET_MODULES_MAPPING"] = method.default_targets
        for field, table in method.default_modules.items():
            found[f"{front}{field.upper()}_MAPPING"] = table
    return found


def __getattr__(name: str) -> object:
    if name == "__all__":
        return sorted(default_tables())
    if name.startswith("TRANSFORMERS_MODELS_TO_") and name in default_tables():
        return default_tables()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *default_tables()})
