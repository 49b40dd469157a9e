"""Small changes of a source file, each of which should make a test fail."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr, ast.Div: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
}  # fmt: skip


class Change(NamedTuple):
    """One line, changed.

    Attributes:
        line: its number, from 1.
        start, end: offsets in the file's text of what is replaced.
        text: what stands there instead.
    """

    line: int
    start: int
    end: int
    text: str

    def applied(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]


def changes_of(path: Path) -> list[Change]:
    """All changes of a file that are neither of words for people nor of types."""
    source = path.read_text(encoding="utf-8")
    # Columns count bytes, offsets count characters.
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def offset(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    found = []
    for node, new in _changed(ast.parse(source)):
        text = new if isinstance(new, str) else ast.unparse(new)
        if isinstance(node, ast.expr):
            text = f"({text})"
        start, end = offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)
        change = Change(node.lineno, start, end, text)
        try:
            compile(change.applied(source), str(path), "exec")
        except SyntaxError:  # inside an f-string, or where only some expressions may stand
            continue
        found.append(change)
    return found


def _changed(tree: ast.AST) -> Iterator[tuple[Any, ast.AST | str]]:
    """Nodes, each with what takes its place."""
    for child in _children(tree):
        yield from _of_statement(child) if isinstance(child, ast.stmt) else _of_expression(child)
        yield from _changed(child)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """What is below a node and computes something."""
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)):
        return  # messages, what types are told, names
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "warn":
        return
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    skipped = {"annotation", "returns", "decorator_list", "bases"}
    for name, value in ast.iter_fields(node):
        if name not in skipped:
            yield from (v for v in (value if isinstance(value, list) else [value]) if isinstance(v, ast.AST))


def _of_statement(node: ast.stmt) -> Iterator[tuple[ast.AST, ast.AST | str]]:
    if isinstance(node, ast.Expr):
        if not isinstance(node.value, (ast.Constant, ast.Yield, ast.YieldFrom)):
            yield node, "pass"
    elif isinstance(node, (ast.AugAssign, ast.Raise, ast.Delete)):
        yield node, "pass"
    elif isinstance(node, ast.Assign):
        if not all(isinstance(target, ast.Name) for target in node.targets):
            yield node, "pass"
    elif isinstance(node, ast.Return) and node.value is not None:
        if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield node, "return None"
    elif isinstance(node, (ast.Continue, ast.Break)):
        yield node, "break" if isinstance(node, ast.Continue) else "continue"
    if isinstance(node, (ast.If, ast.While)):
        yield from _negated(node.test)


def _of_expression(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            yield node, _with(node, lambda new, n=number, o=operator: new.ops.__setitem__(n, _COMPARISONS[type(o)]()))
    elif isinstance(node, ast.BoolOp):
        yield node, _with(node, lambda new: setattr(new, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And()))
        for number in range(len(node.values)):
            yield node, _with(node, lambda new, n=number: new.values.pop(n))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, node.operand
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        yield node, _with(node, lambda new: setattr(new, "op", _OPERATORS[type(node.op)]()))
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield node, ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield from _negated(node.test)
    elif isinstance(node, ast.comprehension):
        for test in node.ifs:
            yield test, ast.Constant(True)


def _negated(test: ast.expr) -> Iterator[tuple[ast.AST, ast.AST]]:
    # Comparisons and the like are changed by themselves.
    if not isinstance(test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
        yield test, ast.UnaryOp(ast.Not(), test)


def _with(node: ast.AST, change: Callable[[Any], object]) -> Any:
    new = copy.deepcopy(node)
    change(new)
    return new
