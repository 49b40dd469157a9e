"""Values of a config file that say what they mean in another kind: `r: 8.0`, `lora_dropout: null`.

Only what has one meaning is read: a whole number written as a float, and null where the field's default is "none" or
"off". Anything else is left as it is, for the method's own check to refuse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias


def cleaned(values: Mapping[str, Any], config_class: type) -> tuple[dict[str, Any], list[str]]:
    """`values` with their meaning spelled as `config_class` does, and a line for each that changed."""
    result, notes = dict(values), []
    for field in dataclasses.fields(config_class):
        if field.name not in values:
            continue
        value = values[field.name]
        meant = _meant(field, value)
        if repr(meant) != repr(value):  # 4 is 4.0, also inside a pattern
            result[field.name] = meant
            notes.append(f"the config has {field.name}={_shown(value)}: read as {_shown(meant)}")
    return result, notes


def check_kinds(values: Mapping[str, Any]) -> None:
    """Refuse values that cannot be what fields of their name hold, in any method.

    Raises:
        ValueError: with the field, the value and what it should be.
    """
    for name, value in values.items():
        if value is None:
            continue
        for is_of_kind, holds, what in _KINDS:
            if is_of_kind(name) and not holds(value):
                raise ValueError(f"`{name}` should be {what}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_indices(value: Any) -> bool:
    return all(type(index) is int for index in (value if isinstance(value, list) else [value]))


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


_Test: TypeAlias = Callable[[Any], bool]
_KINDS: tuple[tuple[_Test, _Test, str], ...] = (
    (lambda name: name.endswith("dropout"), lambda v: _is_number(v) and 0 <= v <= 1, "a number between 0 and 1"),
    (
        lambda name: name in ("rank_pattern", "alpha_pattern"),
        lambda v: isinstance(v, dict),
        "an object of values by name",
    ),
    (lambda name: name == "layers_to_transform", _are_indices, "an index or a list of indices"),
    (
        lambda name: name in ("target_modules", "exclude_modules", "layers_pattern"),
        _are_names,
        "a name or a list of names",
    ),
)


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
