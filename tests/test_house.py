"""The rooms stand one above the other: what the imports of the source may be, and what words it may use where."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "splice"
FILES = sorted(SRC.rglob("*.py"))


def _rooms() -> Any:
    spec = importlib.util.spec_from_file_location("rooms_of_the_house", ROOT / "docs" / "rooms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


HOUSE = _rooms().House.read()


def test_no_circle_among_files() -> None:
    assert HOUSE.circles() == []


def test_no_import_inside_a_function() -> None:
    assert HOUSE.inside_functions == []


def test_nobody_outside_imports_from_methods() -> None:
    reaching = [
        f"{module} -> {other}"
        for module, imported in HOUSE.imports.items()
        for other in imported
        if other.startswith("splice.methods") and not module.startswith("splice.methods")
    ]
    assert reaching == []


def test_every_import_points_down() -> None:
    assert HOUSE.upwards() == []


def test_a_circle_is_found() -> None:
    """The tests above would see what they are for."""
    house = _rooms().House(imports={"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, files=dict.fromkeys("abcd", SRC))
    assert [circle[0] for circle in house.circles()] == ["a", "b", "c"]


def _code(path: Path) -> list[tokenize.TokenInfo]:
    """The tokens of a file without comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    said: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            said.update(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token for token in tokens if token.type != tokenize.COMMENT and token.start[0] not in said]


@pytest.mark.parametrize("path", [p for p in FILES if "methods" not in p.parts], ids=lambda p: str(p.relative_to(SRC)))
def test_no_code_outside_methods_knows_a_method_by_name(path: Path) -> None:
    """The list of all methods that a checkpoint can name, which is the format's, is the one exception."""
    found = [token for token in _code(path) if re.search("lora|ia3", token.string, re.IGNORECASE)]
    if path.relative_to(SRC).as_posix() == "checkpoint/types.py":
        found = [token for token in found if token.string.strip('"') != token.string.strip('"').upper()]
    assert [f"line {token.start[0]}: {token.string}" for token in found] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_warnings_blame_the_caller_by_one_helper(path: Path) -> None:
    if path.name != "errors.py":
        assert "warnings.warn(" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: str(p.parent.name))
def test_packages_hold_no_logic(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    if path.parent != SRC:  # the table of public names
        assert len(body) == 1
        assert isinstance(body[0], ast.Expr), "a docstring that says what may enter"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_every_field_of_a_record_is_described(path: Path) -> None:
    """By a comment above it, or by name in the docstring of its class: of dataclasses, named tuples and configs."""
    text = path.read_text(encoding="utf-8")
    assert [f"{record}.{name}" for record, name in undescribed_fields(text)] == []


def test_a_field_that_nothing_describes_is_found() -> None:
    text = 'class A(NamedTuple):\n    "b: one."\n\n    b: int\n    # Two.\n    c: int\n    d: int\n'
    assert list(undescribed_fields(text)) == [("A", "d")]


def undescribed_fields(text: str) -> Iterator[tuple[str, str]]:
    lines = text.splitlines()
    for record in ast.walk(ast.parse(text)):
        if not isinstance(record, ast.ClassDef) or not is_record(record):
            continue
        said = ast.get_docstring(record) or ""
        for field in record.body:
            if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
                name = ast.unparse(field.target)
                if not lines[field.lineno - 2].strip().startswith("#") and f"{name}:" not in said:
                    yield record.name, name


def is_record(record: ast.ClassDef) -> bool:
    decorators = [ast.unparse(decorator) for decorator in record.decorator_list]
    return "NamedTuple" in map(ast.unparse, record.bases) or any(d.startswith("dataclass") for d in decorators)
