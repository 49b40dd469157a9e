"""The program as a whole: its commands, its options, and how it says that it was called wrongly."""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import splice
from splice.cli.main import names
from tests.cli import EXAMPLE, ROOT, run


def test_its_version() -> None:
    assert run("--version") == (0, f"{splice.__version__}\n", "")


def test_every_command_says_what_it_does() -> None:
    """Without importing torch, which would make a list of commands take seconds."""
    ran = run("--help")
    assert ran.code == 0
    for name in names():
        assert f"\n  {name} " in ran.out
        own = run(name, "--help")
        assert own.code == 0 and f"Usage: splice {name}" in own.out and "--json" in own.out


def test_no_command_imports_torch_before_it_is_called() -> None:
    code = "import sys; sys.modules['torch'] = None; from importlib import import_module as i\n"
    code += f"for name in {names()}: i('splice.cli.commands.' + name)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["inspect"], ["inspect", "--nonsense"], ["inspect", str(EXAMPLE), "more"]], ids=str
)
def test_called_wrongly(arguments: list[str]) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Usage: splice" in ran.err


def test_without_a_command_it_says_what_there_is() -> None:
    ran = run()
    assert "Commands:" in ran.out + ran.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_options_are_completed(shell: str) -> None:
    assert "splice" in run(_SPLICE_COMPLETE=f"{shell}_source").out
    words = {"COMP_WORDS": "splice ins", "COMP_CWORD": "ins" if shell == "fish" else "1"}
    assert "inspect" in run(_SPLICE_COMPLETE=f"{shell}_complete", **words).out


def test_what_it_needs_is_named_where_it_is_not_there(tmp_path: Path) -> None:
    """It is an extra, and the library works without it."""
    code = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'rich' else f(n, *a)\n"
    )
    code += "from splice.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "splice: the command line needs rich: pip install 'splice[cli]'\n"


def _shown() -> list[tuple[str, str]]:
    page = (ROOT / "docs" / "guide" / "command-line.md").read_text(encoding="utf-8")
    return re.findall(r"^```console\nsplice ((?:[^\n]*\\\n)*[^\n]*)\n```\n+```text\n(.*?)^```$", page, re.M | re.S)


@pytest.mark.parametrize(("arguments", "expected"), _shown(), ids=[arguments for arguments, _ in _shown()])
def test_the_page_shows_what_it_writes(arguments: str, expected: str, tmp_path: Path) -> None:
    """`...` stands for anything."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    ran = run(*shlex.split(arguments.replace("\\\n", " ")), cwd=tmp_path)
    ways = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.OutputChecker().check_output(expected, ran.out, ways), ran.out


def test_the_program_is_installed_by_this_name() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^\[project.scripts\]\nsplice = "splice.cli.main:main"$', project, re.M)
