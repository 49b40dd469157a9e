"""The guide does what it says: every block of Python on its pages is run, in order, and prints what stands below it.

A block of ```text below one of ```python is what that prints; a `# -> value` behind an expression is its value. In both,
`...` stands for anything.
"""

from __future__ import annotations

import ast
import doctest
import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.hub import TOKEN, Hub

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs" / "guide").glob("*.md")), ROOT / "docs" / "index.md", ROOT / "docs" / "migration.md"]
_BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?", re.M | re.S)
_VALUE = re.compile(r"\s+# -> (.*)$")


class Block(NamedTuple):
    """A block of Python on a page."""

    # With as many empty lines before it that a traceback names the line of the page.
    code: str
    # What it prints; None where the page does not say.
    printed: str | None


def blocks(text: str) -> list[Block]:
    return [Block("\n" * text.count("\n", 0, m.start(1)) + m[1], m[2]) for m in _BLOCK.finditer(text)]


def same(got: str, expected: str) -> bool:
    """Whether it is what the page says, where white space and `...` may be anything."""
    ways = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(expected, got, ways)


def run(block: Block, page: str, names: dict[str, object]) -> int:
    """Run a block where the ones before it have been, and return how many things it was seen to say."""
    lines = block.code.splitlines()
    seen = 0
    printed = io.StringIO()
    with redirect_stdout(printed):
        for statement in ast.parse(block.code).body:
            said = _VALUE.search(lines[(statement.end_lineno or 0) - 1])
            if said and isinstance(statement, ast.Expr):
                value = repr(eval(compile(ast.Expression(statement.value), page, "eval"), names))
                assert same(value, said[1]), f"{page}:{statement.lineno}: {value}"
                seen += 1
            else:
                exec(compile(ast.Module([statement], []), page, "exec"), names)
    if block.printed is not None:
        assert same(printed.getvalue(), block.printed), f"{page}: {printed.getvalue()}"
        seen += 1
    return seen


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Path:
    """A folder that looks like the root of a checkout, where a page may write what it likes, and a Hub to load from."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repository = hub.repository("someone/skills")
    for commit, skill in (("main", "reverse"), ("v2", "sort")):
        adapter = ROOT / "examples" / "skills" / "adapters" / skill
        files = {path.name: path.read_bytes() for path in adapter.iterdir()}
        repository.commit({**files, **{f"shouting/{name}": content for name, content in files.items()}}, branch=commit)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(page: Path, root: Path) -> None:
    found = blocks(page.read_text(encoding="utf-8"))
    names: dict[str, object] = {"__name__": "__main__"}
    seen = sum(run(block, page.name, names) for block in found)
    assert seen or not found, "a page with code shows what comes of it"


def test_a_page_that_says_something_else_is_noticed() -> None:
    """The test above would see what it is for."""
    text = "```python\nx = 1 + 1\nx  # -> 3\n```\n\nIt prints:\n\n```python\nprint(1)\n```\n\n```text\n2\n```\n"
    value, printed = blocks(text)
    with pytest.raises(AssertionError, match=r"page.md:3: 2"):
        run(value, "page.md", {})
    with pytest.raises(AssertionError, match=r"page.md: 1"):
        run(printed, "page.md", {})
    assert blocks("```console\nmake\n```\n") == []
