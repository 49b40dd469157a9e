"""Change one line at a time of a seeded sample, run the tests that are concerned, and count which changes are noticed.

    python -m tests.mutants --count 150 --seed 0 --jobs 2 --out mutants.jsonl

Nothing of the working tree is changed: every mutant is a copy of `src`. The tests run in a fork of this process, which has
imported what is slow to import and not `splice`, so that most mutants cost a few seconds. A run goes on where one stopped.

Not cosmic-ray: it removes no statements, knows nothing of which tests are concerned, and brings twenty packages along.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from tests.mutants.changes import Change, changes_of
from tests.mutants.concerned import concerned, general

ROOT = Path(__file__).parents[2]
SPLICE = ROOT / "src" / "splice"
MUTATED = ("loading", "surgery", "selection.py", "checkpoint/writing.py")
# A mutant that works so many seconds, where the tests alone work a tenth of it, hangs: that is noticed too. Waiting for a
# processor that others use does not count.
WORK, WAIT = 300, 1800
# Of a test with many parameters so many cases are run at first; with --quick no others.
CASES = 1


def files() -> list[Path]:
    found = [
        p for name in MUTATED for p in ([SPLICE / name] if name.endswith(".py") else (SPLICE / name).rglob("*.py"))
    ]
    return sorted(path for path in found if path.name != "__init__.py")


def sample(count: int, seed: int) -> list[tuple[Path, Change]]:
    """Lines that can be changed, all equally likely, and one change of each."""
    source = random.Random(seed)
    lines: dict[tuple[Path, int], list[Change]] = {}
    for path in files():
        for change in changes_of(path):
            lines.setdefault((path, change.line), []).append(change)
    chosen = source.sample(sorted(lines), min(count, len(lines)))
    return [(path, source.choice(lines[path, line])) for path, line in chosen]


def described(path: Path, change: Change) -> dict[str, Any]:
    source = path.read_text(encoding="utf-8")
    return {
        "file": path.relative_to(SPLICE).as_posix(),
        "line": change.line,
        "was": " ".join(source[change.start : change.end].split()),
        "is": " ".join(change.text.split()),
    }


def noticed_by(path: Path, change: Change, tests: list[str], cases: int) -> str | None:
    """The test that fails, or that the tests hang; None where all pass. `cases` of each test are run, all if 0."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        shutil.copytree(ROOT / "src", Path(folder, "src"), ignore=shutil.ignore_patterns("__pycache__"))
        mutated = Path(folder, "src", "splice", path.relative_to(SPLICE))
        mutated.write_text(change.applied(path.read_text(encoding="utf-8")), encoding="utf-8")
        said = Path(folder, "said")
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os._exit(_run(Path(folder), said, tests, cases))
        ended = time.monotonic() + WAIT
        while time.monotonic() < ended:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                # 1: a test failed; 2 to 4: the tests could not even be collected.
                code = os.waitstatus_to_exitcode(status)
                return None if code == 0 else (said.read_text() if said.exists() else f"exit code {code}")
            time.sleep(0.2)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return f"it hangs: {WAIT} seconds"


def _run(folder: Path, said: Path, tests: list[str], cases: int) -> int:
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (WORK, WORK + 5))
    sys.path.insert(0, str(folder / "src"))
    os.environ["PYTHONPATH"] = str(folder / "src")
    sys.dont_write_bytecode = True

    class First:
        """Writes down the first failure, and thins out the cases."""

        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            kept: dict[str, list[Any]] = {}
            for item in items:
                kept.setdefault(item.nodeid.partition("[")[0], []).append(item)
            # From the whole range: neighbours are most alike.
            thin = {id(item) for own in kept.values() for item in own[:: -(-len(own) // cases) if cases else 1]}
            items[:] = [item for item in items if id(item) in thin]

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed and not said.exists():
                said.write_text(report.nodeid)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed and not said.exists():
                said.write_text(f"{report.nodeid}, when it is imported")

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(io.StringIO()):
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", "-W", "ignore"]
        options = [f"--basetemp={folder / 'tmp'}", f"--rootdir={ROOT}"]
        try:
            return int(pytest.main([*arguments, *options, *tests], plugins=[First()]))
        except BaseException:
            return 70


def work(chosen: list[tuple[Path, Change]], out: Path, quick: bool) -> None:
    """Try mutants one by one; a line of JSON for each."""
    known = {(m["file"], m["line"], m["is"]) for m in read(out)}
    for path, change in chosen:
        shown = described(path, change)
        if (shown["file"], shown["line"], shown["is"]) in known:
            continue
        module = shown["file"].removesuffix(".py")
        began = time.monotonic()
        first = list(concerned(module))
        by = noticed_by(path, change, first, CASES)
        if not quick:
            by = by or noticed_by(path, change, general(module), CASES) or noticed_by(path, change, first, 0)
        line = json.dumps({**shown, "by": by, "seconds": round(time.monotonic() - began, 1)})
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="ask the concerned tests alone, a few cases of each")
    parser.add_argument("--out", type=Path, default=ROOT / "mutants.jsonl")
    options = parser.parse_args()
    # What tests import, once for all forks; never splice itself.
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.gpt2
    import transformers.models.llama  # noqa: F401

    torch.set_num_threads(1)
    assert not any(name.partition(".")[0] == "splice" for name in sys.modules)
    chosen = sample(options.count, options.seed)
    workers = []
    for number in range(options.jobs):
        worker = os.fork()
        if worker == 0:
            work(chosen[number :: options.jobs], options.out, options.quick)
            os._exit(0)
        workers.append(worker)
    for worker in workers:
        os.waitpid(worker, 0)
    found = read(options.out)
    survivors = [mutant for mutant in found if mutant["by"] is None]
    print(f"{len(found)} lines changed, {len(found) - len(survivors)} noticed ({1 - len(survivors) / len(found):.0%})")
    for folder, count in sorted(Counter(mutant["file"].rpartition("/")[0] for mutant in found).items()):
        own = sum(mutant["file"].rpartition("/")[0] == folder for mutant in survivors)
        print(f"  {folder or 'src/splice'}: {count - own} of {count}")
    for mutant in survivors:
        print(f"{mutant['file']}:{mutant['line']}  {mutant['was']}  ->  {mutant['is']}")


if __name__ == "__main__":
    main()
