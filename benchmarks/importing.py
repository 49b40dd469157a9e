"""What importing the library costs a program that has torch already."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.measure import Settings, alternate
from benchmarks.models import LIBRARIES, REFERENCE, SPLICE
from benchmarks.report import Row, row

# splice imports a public name when it is first asked for, so every one of them is asked for.
# What importing torch leaves to the garbage collector is collected first: that costs 60 ms, wherever it happens to fall.
_SCRIPT = """
import gc, time, torch
gc.collect()
start = time.perf_counter()
import {library}
for name in [*{library}.__all__, "LoraConfig"]:
    getattr({library}, name)
print(time.perf_counter() - start)
"""


def rows(settings: Settings) -> Iterator[Row]:
    """Import the library and every public name, in processes of their own."""
    candidates = {library: partial(_import, library) for library in LIBRARIES}
    samples = alternate(candidates, rounds=settings.pick(7, 1))
    what = "import beyond torch, all public names"
    yield row(what, samples[REFERENCE].median * 1e3, samples[SPLICE].median * 1e3, "ms").at_most(120)


def _import(library: str) -> float:
    script = _SCRIPT.format(library=library)
    # Where Python writes no compiled files, compiling the sources would be most of it; an installed library has them.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=env)
    return float(done.stdout)
