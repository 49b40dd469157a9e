"""What the commands write: JSON for programs, text for people. What comes from files is shown with its escapes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Columns of text that goes into a file or another program, which has no width of its own: no table is cut off there. Text
# that has to be broken somewhere is broken at the other.
_WIDTH, BROKEN_AT = 10_000, 160


def shown(text: str) -> str:
    """`text` as it may be written on a terminal: names in files can hold sequences that change what stands there."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def print_json(data: object) -> None:
    """Write `data` as one JSON value."""
    print(json.dumps(_plain(data), indent=2))


def _plain(value: object) -> object:
    """`value` of what JSON has; numbers that it has no spelling for are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def console() -> Console:
    """Where text for people goes."""
    from rich.console import Console

    # No markup and no highlighting: brackets in names are brackets.
    width = None if sys.stdout.isatty() else _WIDTH
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=True, width=width)


def number(value: float) -> str:
    """A number for people: four digits that count, thousands apart."""
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}"
