"""How much work something is: counted, since no other process disturbs that."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any


def calls_of(function: Callable[[], Any]) -> int:
    """How many functions are called while `function` runs."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    # What earlier tests left to the garbage collector would be counted wherever it happens to be collected.
    gc.disable()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def lines_run(function: Callable[[], Any]) -> int:
    """How many lines of Python a call runs: what grows with the number of adapters shows."""
    count = 0

    def trace(*_: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    # Of coverage and the like.
    before = sys.gettrace()
    gc.disable()  # what it runs is others' business
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
        gc.enable()
    return count
