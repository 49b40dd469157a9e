"""Values of a config file that are of another type than the field, and can mean one thing: `r: 8.0`, `lora_dropout: null`.

These are a whole number written as a float, and null where the field's default is "none" or "off". Anything else is left
as it is, for the method's own check to refuse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from splice.checkpoint.annotations import fits, is_countable
from splice.checkpoint.patterns import check_expressions


def cleaned(values: Mapping[str, object], config_class: type) -> tuple[dict[str, object], list[str]]:
    """`values` in the types that the fields of `config_class` have, and a line for each value that changed."""
    # Judged by a field's default and not by its annotation: the reference's are often narrower than what it writes.
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


def check_kinds(values: Mapping[str, object], config_class: type) -> None:
    """Refuse a value that a field cannot hold, by its name or its annotation.

    Raises:
        ValueError: with the field, the value and what it should be.
    """
    annotations = {field.name: str(field.type) for field in dataclasses.fields(config_class)}
    for name, value in values.items():
        for rule in _RULES if value is not None else ():
            if rule.has(name) and not rule.holds(value):
                raise ValueError(f"`{name}` should be {rule.what}, got {value!r}")
        if name == "auto_mapping":  # tools put marks of their own into it
            continue
        if not fits(annotations[name], value):
            what = "a positive integer" if name == "r" else annotations[name]
            raise ValueError(f"`{name}` should be {what}, got {_shown(value)}")
        if not is_countable(value):
            raise ValueError(f"`{name}` has a number that is too large: {_shown(value)}")
        if name.endswith("_pattern") and isinstance(value, dict):
            check_expressions(value, name)


class _Rule(NamedTuple):
    """A check for fields of certain names, the same in every method that has them."""

    # Whether the rule is for a field of this name.
    has: Callable[[str], bool]
    # Whether it may hold this value.
    holds: Callable[[object], bool]
    # What it should hold, for the message.
    what: str


def _is_fraction(value: object) -> bool:
    # JSON's true and false are numbers to Python.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _are_indices(value: object) -> bool:
    return all(type(index) is int for index in (value if isinstance(value, list) else [value]))


def _is_whole(value: object) -> bool:
    return type(value) is int


def _are_names(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


_RULES = (
    _Rule(lambda name: name.endswith("dropout"), _is_fraction, "a number between 0 and 1"),
    _Rule(
        lambda name: name in ("rank_pattern", "alpha_pattern", "auto_mapping"),
        lambda value: isinstance(value, dict),
        "an object of values by name",
    ),
    _Rule(lambda name: name.endswith(("seed", "prng_key")), _is_whole, "a whole number"),
    _Rule(lambda name: name == "layers_to_transform", _are_indices, "an index or a list of indices"),
    _Rule(
        lambda name: name in ("target_modules", "exclude_modules", "layers_pattern"),
        _are_names,
        "a name or a list of names",
    ),
)


def _meant(field: dataclasses.Field[object], value: object) -> object:
    if value is None:
        return next(_meaning_of_null(field), None)
    if type(field.default) is int:
        return _whole(value)
    if isinstance(value, dict) and field.name.endswith("_pattern"):
        whole = {k: _whole(v) for k, v in value.items()}
        return whole if any(type(whole[k]) is not type(value[k]) for k in value) else value
    return value


def _meaning_of_null(field: dataclasses.Field[object]) -> Iterator[object]:
    """What null means: off, of a switch; "none", of a choice; empty, of a collection. Of any other field it means nothing."""
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


def _whole(value: object) -> object:
    """8 for 8.0; anything else as it is."""
    # Some tools write every number as a float. 8.5 is left for the method to refuse: rounding it would be a guess.
    return int(value) if type(value) is float and value.is_integer() else value


def _shown(value: object) -> str:
    # As the file spells it, where Python and JSON differ.
    return "null" if value is None else repr(value)
