"""Values of a config file that say what they mean in another kind: `r: 8.0`, `lora_dropout: null`.

Only what has one meaning is read: a whole number written as a float, and null where the field's default is "none" or
"off". Anything else is left as it is, for the method's own check to refuse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

# What the merged-linear LoRA of 2023 had beside the fields of today.
ENABLE_LORA = "enable_lora"
# Switches of the old training code that say nothing about the adapter.
_MEANINGLESS = ("merge_weights", ENABLE_LORA)


def cleaned(values: Mapping[str, Any], config_class: type) -> tuple[dict[str, Any], list[str]]:
    """`values` with their meaning spelled as `config_class` does, and a line for each that changed."""
    result, notes = dict(values), []
    for field in dataclasses.fields(config_class):
        if field.name not in values:
            continue
        value = values[field.name]
        meant = _meant(field, value)
        if type(meant) is not type(value) or meant != value:
            result[field.name] = meant
            notes.append(f"the config has {field.name}={_shown(value)}: read as {_shown(meant)}")
    return result, notes


def legacy(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of long ago that are understood, though no config has them any more."""
    return {name: values[name] for name in _MEANINGLESS if name in values}


def _meant(field: dataclasses.Field[Any], value: Any) -> Any:
    default = field.default
    if value is None:
        return next(_meaning_of_null(field), None)
    if type(default) is int and _is_whole(value):
        return int(value)
    if isinstance(value, dict) and field.name.endswith("_pattern"):
        whole = {k: int(v) if _is_whole(v) else v for k, v in value.items()}
        return whole if any(type(whole[k]) is not type(value[k]) for k in value) else value
    return value


def _meaning_of_null(field: dataclasses.Field[Any]) -> Iterator[Any]:
    """What null can only mean: nothing, where the field is on or off, names a choice "none", or holds a collection."""
    if field.default is False:
        yield False
    elif field.default is True and field.name.startswith("init_"):
        yield True  # how tensors begin that are about to be read
    elif field.name == "bias" and field.default == "none":
        yield "none"
    elif field.name.endswith("dropout") and field.default == 0.0:
        yield 0.0
    elif field.name.endswith("_pattern") and field.default_factory is dict:
        yield {}


def _is_whole(value: Any) -> bool:
    return type(value) is float and value.is_integer()


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)
