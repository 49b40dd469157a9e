"""The same script under both libraries: here `peft` is splice, and in a process of its own it is the reference."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def shim_version() -> str:
    """The version that the shim's pyproject.toml states."""
    lines = (ROOT / "peft-shim" / "pyproject.toml").read_text().splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version"))


def reference(scenario: Callable[..., Any], *arguments: Any) -> Any:
    """What `scenario(*arguments)` returns where `peft` is the reference.

    Args:
        scenario: a function of a test module, found there by its name. It imports `peft` itself, or its module does.
        arguments: strings, numbers, paths, tensors: whatever torch can write.

    Raises:
        AssertionError: it failed there; the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="reference-") as folder:
        given, result = Path(folder, "arguments.pt"), Path(folder, "result.pt")
        torch.save(arguments, given)
        # Without the shim's folder, the first on the path, it is the reference that is found.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT)))}
        command = [sys.executable, "-m", __name__, scenario.__module__, scenario.__qualname__, str(given), str(result)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(result, weights_only=False)


def seed_of(*parts: object) -> int:
    """A number that is the same in both processes, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def _main(module: str, name: str, given: str, result: str) -> None:
    import peft

    assert "splice" not in peft.__version__
    torch.set_num_threads(1)
    value = getattr(importlib.import_module(module), name)(*torch.load(given, weights_only=False))
    torch.save(value, result)


if __name__ == "__main__":
    _main(*sys.argv[1:])
