"""Running the program `splice` as its users do: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests.warm import Ended, warm

# Those that import torch and transformers.
_HEAVY = ("verify", "merge", "convert", "run")
ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "skills" / "adapters" / "reverse"
BASE = ROOT / "examples" / "skills" / "base"


class Ran(NamedTuple):
    """What a run ended with."""

    # 0 fine, 1 a problem was found, 2 it was called wrongly.
    code: int
    # What it wrote.
    out: str
    # What it complained of.
    err: str


def run(
    *arguments: str | Path, cwd: Path = ROOT, input: str = "", new_process: bool = False, **environment: str
) -> Ran:
    """`python -m splice` with these arguments; what takes seconds to start by a fork of a process that has done so.

    Of each command that does, some test asks for a `new_process`, as all do that come with an environment.
    """
    command = ["-m", "splice", *map(str, arguments)]
    forks = sys.platform != "win32" and not new_process and not environment
    if forks and arguments and arguments[0] in _HEAVY:
        ended = warm(*command, cwd=cwd, input=input)
    else:
        done = subprocess.run(
            [sys.executable, *command],
            input=input,
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env={**os.environ, **environment},
            timeout=240,
        )
        ended = Ended(done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in ended.stderr, ended.stderr
    return Ran(*ended)


def run_json(*arguments: str | Path, **options: Any) -> tuple[int, Any]:
    """The exit code, and what it wrote as JSON."""
    ran = run(*arguments, "--json", **options)
    return ran.code, json.loads(ran.out)
