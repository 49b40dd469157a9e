"""Which tests run through a line: measured once, so that a changed line is asked about by those tests alone."""

from __future__ import annotations

import ast
import json
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

# Asked about lines that run when splice is imported: every test does, and these fail first.
AT_IMPORT = [f"tests/test_{name}.py" for name in ("words", "keys", "checkpoint", "tree", "selection", "saving")]
# These run splice in other processes, where nobody measures; asked about what no other test notices.
ELSEWHERE = ["tests/test_distributed.py"]
# Neither run splice nor say anything of a line: texts, the shape of the code, types.
LEFT_OUT = {f"test_{name}.py" for name in ("house", "docs", "site", "guide", "typed", "without_torch", "distributed")}
# Of a test with many parameters so many cases are measured, from its whole range: neighbours are most alike.
CASES = 2


def thinned(items: Iterable[Any], cases: int) -> list[Any]:
    """At most so many cases of each test; all if 0."""
    own: dict[str, list[Any]] = {}
    for item in items:
        own.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return [item for found in own.values() for item in found[:: -(-len(found) // cases) if cases else 1]]


def lines_of_statement(path: Path, line: int) -> range:
    """The lines of the innermost statement that `line` belongs to; of one with a body, those before its body."""
    found = range(line, line + 1)
    size = sys.maxsize
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.stmt):
            continue
        end = node.end_lineno or node.lineno
        if isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef, ast.ClassDef)):
            end = max(node.lineno, node.body[0].lineno - 1)
        if node.lineno <= line <= end and end - node.lineno < size:
            size, found = end - node.lineno, range(node.lineno, end + 1)
    return found


class Recorder:
    """A plugin of pytest that notes which tests run through some lines of files, and how many seconds each test takes."""

    def __init__(self, lines: dict[str, set[int]]) -> None:
        self.lines = lines
        self.found: dict[str, dict[int, dict[str, None]]] = {}
        self.seconds: dict[str, float] = {}
        self._test, self._began = "", 0.0
        self._wanted: dict[CodeType, bool] = {}

    def start(self) -> None:
        sys.settrace(self._trace)
        threading.settrace(self._trace)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = thinned(items, CASES)

    def pytest_runtest_setup(self, item: Any) -> None:
        self._test, self._began = item.nodeid, time.perf_counter()
        self.start()  # a test may have taken it away

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] = round(time.perf_counter() - self._began, 2)
        self._test = ""

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        wanted = self._wanted.get(code)
        if wanted is None:
            own = self.lines.get(code.co_filename, set())
            wanted = self._wanted[code] = any(line in own for _, _, line in code.co_lines())
        return self._trace_lines if wanted else None

    def _trace_lines(self, frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        if event == "line" and frame.f_lineno in self.lines[name]:
            self.found.setdefault(name, {}).setdefault(frame.f_lineno, {})[self._test] = None
        return self._trace_lines


class Reached(NamedTuple):
    """What was measured."""

    # Of each test, as pytest names it.
    seconds: dict[str, float]
    # The tests that run through a line, by the name of its file and its number; "" where it runs at import.
    tests: dict[str, dict[str, list[str]]]

    @classmethod
    def read(cls, path: Path) -> Reached:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self._asdict()), encoding="utf-8")

    def joined(self, other: Reached) -> Reached:
        tests = {name: dict(lines) for name, lines in self.tests.items()}
        for name, lines in other.tests.items():
            for line, found in lines.items():
                own = tests.setdefault(name, {})
                own[line] = [*own.get(line, []), *found]
        return Reached({**self.seconds, **other.seconds}, tests)

    def by(self, path: Path, line: int) -> list[str]:
        """The tests that run through the statement at a line, the fastest first."""
        lines = self.tests.get(str(path), {})
        found = {test for number in lines_of_statement(path, line) for test in lines.get(str(number), ())}
        if found == {""}:
            return AT_IMPORT
        return sorted(found - {""}, key=lambda test: self.seconds.get(test, 0.0))


def reached(recorder: Recorder) -> Reached:
    found = {name: {str(line): list(tests) for line, tests in lines.items()} for name, lines in recorder.found.items()}
    return Reached(recorder.seconds, found)
