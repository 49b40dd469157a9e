"""Whether a value from a config file can be what a field says that it holds: a number, a text, a list, an object.

Told by the annotation, and no stricter than what the reference writes and tools around it: a whole number where a fraction
is meant, 1 for true, one name in the place of a list of one.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from math import isfinite

Test = Callable[[object], bool]
# The largest whole number that a tensor's size, or a value in it, can be.
_LARGEST = 2**63 - 1


def fits(annotation: str, value: object) -> bool:
    """Whether `value`, as JSON has it, can stand in a field of this annotation: "int | None", "dict[str, int]"."""
    return _test(annotation)(value)


def is_countable(value: object) -> bool:
    """Whether no whole number in `value` is beyond those of 64 bits."""
    if isinstance(value, dict):
        return all(map(is_countable, value.values()))
    if isinstance(value, list):
        return all(map(is_countable, value))
    return not isinstance(value, int) or abs(value) <= _LARGEST


@cache
def _test(annotation: str) -> Test:
    return _of(ast.parse(annotation, mode="eval").body)


def _of(node: ast.expr) -> Test:
    if isinstance(node, ast.BinOp):
        either, other = _of(node.left), _of(node.right)
        return lambda value: either(value) or other(value)
    if isinstance(node, ast.Constant):
        return lambda value: value is None
    if isinstance(node, ast.Subscript):
        return _of_several(ast.unparse(node.value), node.slice)
    name = ast.unparse(node)
    if name in ("int", "float", "bool"):
        # Of a number that is no whole one each method says itself what it makes. true is a number to Python alone.
        return lambda value: (
            isinstance(value, (int, float)) and isfinite(value) and (name == "bool" or not isinstance(value, bool))
        )
    if name.endswith("Config"):
        return lambda value: isinstance(value, dict)
    # A text, or a choice of several: which there are is for others to say.
    return lambda value: isinstance(value, str)


def _of_several(name: str, items: ast.expr) -> Test:
    if name == "dict":
        assert isinstance(items, ast.Tuple)
        each = _of(items.elts[1]) if ast.unparse(items.elts[1]) != "object" else lambda value: True
        return lambda value: isinstance(value, dict) and all(map(each, value.values()))
    if name == "Literal":
        return _of(ast.Name("str"))
    own = _of(items)
    # One name is a list of one. A number is none, of a field that does not say so.
    return lambda value: all(map(own, value)) if isinstance(value, list) else isinstance(value, str) and own(value)
