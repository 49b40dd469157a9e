"""Change one line at a time of a seeded sample, run the tests that run through it, and count which changes are noticed.

    python -m tests.mutants --count 150 --seed 0 --jobs 2 --out mutants.jsonl
    python -m tests.mutants --count 5 --only selection.py --tests tests/test_kept_selections.py --out few.jsonl

First all tests are run once, a few cases of each, to see which of them run through which line. Nothing of the working tree
is changed: every mutant is a copy of `src`. The tests run in a fork of this process, which has imported what is slow to
import and not `splice`, so that most mutants cost a few seconds. A run goes on where one stopped.

Not cosmic-ray: it removes no statements, knows nothing of which tests are concerned, and brings twenty packages along.
"""

from __future__ import annotations

import argparse
import compileall
import gc
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
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from tests.mutants.changes import Change, changes_of
from tests.mutants.reached import ELSEWHERE, LEFT_OUT, Reached, Recorder, lines_of_statement, reached

ROOT = Path(__file__).parents[2]
SPLICE = ROOT / "src" / "splice"
MUTATED = ("loading", "surgery", "selection.py", "checkpoint/writing.py")
# A mutant that works so many seconds in the first tests, which alone work a tenth of it, hangs: that is noticed too. All
# other tests get ten times as many. Waiting for a processor that others use does not count.
WORK, WAIT = 300, 1800
# The fastest tests of a line that take so many seconds together are run at first; with --quick no others.
FIRST = 40


def files(only: Sequence[str] = MUTATED) -> list[Path]:
    found = [p for name in only for p in ([SPLICE / name] if name.endswith(".py") else (SPLICE / name).rglob("*.py"))]
    return sorted(path for path in found if path.name != "__init__.py")


def sample(count: int, seed: int, only: Sequence[str] = MUTATED) -> list[tuple[Path, Change]]:
    """Lines that can be changed, all equally likely, and one change of each."""
    source = random.Random(seed)
    lines: dict[tuple[Path, int], list[Change]] = {}
    for path in files(only):
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


def measure(chosen: Sequence[tuple[Path, Change]], out: Path, jobs: int, tests: Sequence[str] = ()) -> Reached:
    """Which tests run through the lines that are to be changed. Kept in `out`, and taken from there."""
    if out.exists():
        return Reached.read(out)
    lines: dict[str, set[int]] = {}
    for path, change in chosen:
        lines.setdefault(str(path), set()).update(lines_of_statement(path, change.line))
    tests = tests or sorted(str(path) for path in (ROOT / "tests").glob("test_*.py") if path.name not in LEFT_OUT)
    with tempfile.TemporaryDirectory(prefix="reached-") as folder:
        parts = [Path(folder, str(number)) for number in range(jobs)]
        children = []
        for number, part in enumerate(parts):
            child = os.fork()
            if child == 0:
                recorder = Recorder(lines)
                recorder.start()
                _pytest(ROOT / "src", part.with_suffix(".tmp"), tests[number::jobs], recorder)
                reached(recorder).write(part)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        found = Reached({}, {})
        for part in parts:
            found = found.joined(Reached.read(part))
    found.write(out)
    return found


def noticed_by(path: Path, change: Change, tests: Sequence[str], times: int = 1) -> str | None:
    """The test that fails, or that the tests hang; None where all pass. They may take `times` as long as the first."""
    if not tests:
        return None
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        shutil.copytree(ROOT / "src", Path(folder, "src"))  # with what is compiled, which holds for all other files
        mutated = Path(folder, "src", "splice", path.relative_to(SPLICE))
        mutated.write_text(change.applied(path.read_text(encoding="utf-8")), encoding="utf-8")
        said = Path(folder, "said")
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os._exit(_run(Path(folder), said, tests, WORK * times))
        ended = time.monotonic() + WAIT * times
        while time.monotonic() < ended:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                # 1: a test failed; 2 to 4: the tests could not even be collected.
                code = os.waitstatus_to_exitcode(status)
                return None if code == 0 else (said.read_text() if said.exists() else f"exit code {code}")
            time.sleep(0.2)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return f"it hangs: {WAIT * times} seconds"


def _run(folder: Path, said: Path, tests: Sequence[str], seconds: int) -> int:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))

    class First:
        """Writes down the first failure."""

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed and not said.exists():
                said.write_text(report.nodeid)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed and not said.exists():
                said.write_text(f"{report.nodeid}, when it is imported")

    return _pytest(folder / "src", folder / "tmp", tests, First(), "-x")


def _pytest(source: Path, temporary: Path, tests: Sequence[str], plugin: object, *options: str) -> int:
    """Run tests with splice from the folder `source`, in this process; the exit code."""
    import pytest

    sys.path.insert(0, str(source))
    os.environ["PYTHONPATH"] = str(source)
    sys.dont_write_bytecode = True
    left_out = [
        argument for name in ("cacheprovider", "xdist", "unraisableexception") for argument in ("-p", f"no:{name}")
    ]
    arguments = ["-q", *left_out, "-m", "not slow", "-W", "ignore"]
    folders = [f"--basetemp={temporary}", f"--rootdir={ROOT}"]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(io.StringIO()):
        try:
            return int(pytest.main([*arguments, *folders, *options, *tests], plugins=[plugin]))
        except BaseException:
            return 70


def _first(tests: Sequence[str], seconds: dict[str, float]) -> int:
    """How many of these tests, the fastest first, are run at first: one at least."""
    total = 0.0
    for number, test in enumerate(tests):
        total += seconds.get(test, 0.0)
        if number and total > FIRST:
            return number
    return len(tests)


def work(chosen: list[tuple[Path, Change]], out: Path, measured: Reached, quick: bool) -> None:
    """Try mutants one by one; a line of JSON for each."""
    known = {(m["file"], m["line"], m["is"]) for m in read(out)}
    for path, change in chosen:
        shown = described(path, change)
        if (shown["file"], shown["line"], shown["is"]) in known:
            continue
        began = time.monotonic()
        tests = measured.by(path, change.line)
        first = _first(tests, measured.seconds)
        by = noticed_by(path, change, tests[:first])
        if not quick:
            # The slower ones, and then the other cases of all.
            whole = list(dict.fromkeys(test.partition("[")[0] for test in tests))
            by = by or noticed_by(path, change, tests[first:], 10) or noticed_by(path, change, whole, 10)
            # Last those where nobody measures: what only several processes show.
            by = by or noticed_by(path, change, ELSEWHERE, 10)
        line = json.dumps({**shown, "by": by, "asked": len(tests), "seconds": round(time.monotonic() - began, 1)})
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=MUTATED, help="files and folders of src/splice to change lines of")
    parser.add_argument("--tests", nargs="+", default=(), help="files of tests to ask, in place of all")
    parser.add_argument("--quick", action="store_true", help="ask the fastest tests alone")
    parser.add_argument("--out", type=Path, default=ROOT / "mutants.jsonl")
    options = parser.parse_args()
    # What tests import, once for all forks; never splice itself.
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.bert.modeling_bert
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is here stays, and no fork is to look through it again
    assert not any(name.partition(".")[0] == "splice" for name in sys.modules)
    compileall.compile_dir(ROOT / "src", quiet=2)
    chosen = sample(options.count, options.seed, options.only)
    measured = measure(chosen, options.out.with_suffix(".reached.json"), options.jobs, options.tests)
    workers = []
    for number in range(options.jobs):
        worker = os.fork()
        if worker == 0:
            work(chosen[number :: options.jobs], options.out, measured, options.quick)
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
        print(f"{mutant['file']}:{mutant['line']}  {mutant['was']}  ->  {mutant['is']}  ({mutant['asked']} tests)")


if __name__ == "__main__":
    main()
