"""Running the program `splice` as its users do: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

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


def run(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> Ran:
    """`python -m splice` with these arguments."""
    done = subprocess.run(
        [sys.executable, "-m", "splice", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=240,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Ran(done.returncode, done.stdout, done.stderr)


def run_json(*arguments: str | Path, **options: Any) -> tuple[int, Any]:
    """The exit code, and what it wrote as JSON."""
    ran = run(*arguments, "--json", **options)
    return ran.code, json.loads(ran.out)
