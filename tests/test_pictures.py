"""The pictures of the documentation show what the program writes today."""

from __future__ import annotations

import doctest
import importlib.util
import re
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from tests.cli import EXAMPLE, ROOT, run

# Bytes of a picture: a reader of the front page waits for it.
_LARGEST = 150_000


def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MADE = pictures()


def shown(command: str) -> str:
    """What stands below a command in the picture of a terminal."""
    text = "\n".join(MADE.text_of(MADE.TERMINAL.read_text(encoding="utf-8")))
    _, found, rest = text.partition(f"$ {command}\n")
    assert found, f"{command!r} is not in the picture: run `make pictures`"
    return rest.partition("\n$ ")[0].rstrip("\n")


def test_the_picture_of_a_terminal_shows_what_inspect_writes() -> None:
    command = MADE.COMMANDS[0]
    written = re.sub(r"\x1b\[[\d;]*m", "", MADE.written(command))
    assert shown(command) == written.rstrip("\n"), "run `make pictures`"


def test_the_picture_of_a_terminal_shows_what_run_writes() -> None:
    """By the page on the command line, which has the same call, and which another test holds to what it writes."""
    command = MADE.COMMANDS[1]
    page = (ROOT / "docs" / "guide" / "command-line.md").read_text(encoding="utf-8")
    _, found, rest = page.partition(f"```console\n{command}\n```\n\n```text\n")
    assert found
    ways = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    expected = rest.partition("```")[0]
    assert doctest.OutputChecker().check_output(expected, f"{shown(command)}\n", ways), "run `make pictures`"


def test_pictures_are_small_and_fetch_nothing() -> None:
    for path in (MADE.TERMINAL, MADE.HEAT_MAP):
        text = path.read_text(encoding="utf-8")
        assert len(text) < _LARGEST
        assert not re.search(r"url\(['\"]?http|<script|(href|src)=['\"]http", text)


@pytest.mark.skipif(
    f"matplotlib=={version('matplotlib')}\n" not in (ROOT / "constraints.txt").read_text(encoding="utf-8"),
    reason="another version of matplotlib draws the same map in other bytes",
)
def test_the_heat_map_is_what_inspect_draws(tmp_path: Path) -> None:
    ran = run("inspect", EXAMPLE.relative_to(ROOT), "--plot", tmp_path / "map.svg")
    assert ran.code == 0
    assert (tmp_path / "map.svg").read_text() == MADE.HEAT_MAP.read_text(encoding="utf-8"), "run `make pictures`"


def test_a_picture_that_says_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tests above would see what they are for."""
    other = tmp_path / "terminal.svg"
    other.write_text(MADE.TERMINAL.read_text(encoding="utf-8").replace("HELLO", "HULLO"), encoding="utf-8")
    monkeypatch.setattr(MADE, "TERMINAL", other)
    with pytest.raises(AssertionError, match="run `make pictures`"):
        test_the_picture_of_a_terminal_shows_what_run_writes()
