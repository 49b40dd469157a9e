"""Patterns of a config: values that it gives to single layers, by regular expressions for their paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

# What a pattern gives to a layer: a rank, an alpha.
V = TypeVar("V")


def value_for(pattern: Mapping[str, V], path: str, default: V) -> V:
    """The value of the first key of `pattern` that matches the module at `path`, else `default`.

    A key is a regular expression for the end of the path, from a dot on; `^` anchors it to the whole path.
    """
    for key, value in pattern.items():
        if _tail_pattern(key).match(path):
            return value
    return default


def value_behind_dot(pattern: Mapping[str, V], path: str, default: V) -> V:
    """As `value_for`, of methods that take a key for what stands behind one of the path's dots, else for the path itself."""
    found = next((key for key in pattern if _behind_dot(key).match(path)), path)
    return pattern.get(found, default)


@lru_cache(maxsize=1024)
def _behind_dot(key: str) -> re.Pattern[str]:
    return expression(rf".*\.{key}$", key, "a pattern of sizes")


@lru_cache(maxsize=1024)
def _tail_pattern(key: str) -> re.Pattern[str]:
    return expression(rf"(.*\.)?({key})$", key, "a pattern of ranks or alphas")


def check_expressions(pattern: Mapping[str, object], field: str) -> None:
    """Refuse keys that are no regular expressions, of the pattern that a config has in `field`.

    Raises:
        ValueError: one of them is none.
    """
    for key in pattern:
        if not _PLAIN.fullmatch(key):  # nearly all are names, and to compile hundreds of these takes long
            expression(key, key, field)


_PLAIN = re.compile(r"[\w.]*")


def expression(text: str, given: str, what: str) -> re.Pattern[str]:
    """`text` as a regular expression, made of what the config has.

    Raises:
        ValueError: it is not a valid one; the message says that it is `given` in `what`.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{given!r}, in {what} of the config, is no regular expression: {error}") from error
