"""docs/ecosystem.md: what was shown to work with which library, as the tests say it.

A test says it by a mark: `@pytest.mark.shows("transformers", "`load_adapter` of a folder")`. `--write-table` writes the rows
of the files that are run (`python -m tests.ecosystem [FILES] --write-table`); every other run only compares.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.ecosystem.both import ROOT

TABLE = ROOT / "docs" / "ecosystem.md"
HEAD = """# What runs on splice under the name `peft`

Written by `python -m tests.ecosystem --write-table`: each row is a test in `tests/ecosystem/` that runs the library itself,
at the version named, where `peft` is [the shim](../peft-shim/README.md). Not run: what it needs (a GPU, for one) was not
there when the table was written.
"""
COLUMNS = "| version | what runs | passes | test |\n|---|---|---|---|\n"
PASSES, FAILS, NOT_RUN = "yes", "**no**", "not run"


class Row(NamedTuple):
    """What one marked test shows, by which the table knows it."""

    library: str
    what: str
    file: str


class State(NamedTuple):
    """What came of it, and under which version of the library."""

    version: str
    passes: str


def row_of(item: pytest.Item) -> Row | None:
    mark = item.get_closest_marker("shows")
    if mark is None:
        return None
    library, what = mark.args
    assert "|" not in what, f"{item.nodeid}: a bar ends a cell of the table"
    return Row(library, what, item.path.name)


def state_of(row: Row, outcomes: list[str]) -> State:
    """Of all the tests that show the same, one for each parameter: it passes if none failed and one passed."""
    passes = FAILS if "failed" in outcomes else PASSES if "passed" in outcomes else NOT_RUN
    return State(version(row.library), passes)


def read() -> dict[Row, State]:
    rows: dict[Row, State] = {}
    library = ""
    for line in TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else ():
        if line.startswith("## "):
            library = line[3:]
        elif line.startswith("| ") and not line.startswith("| version "):
            number, what, passes, file = line.strip("| ").split(" | ")
            rows[Row(library, what, file.strip("`"))] = State(number, passes)
    return rows


def write(rows: dict[Row, State]) -> None:
    text = HEAD
    for library in sorted({row.library for row in rows}):
        text += f"\n## {library}\n\n{COLUMNS}"
        for row in sorted(row for row in rows if row.library == library):
            text += f"| {rows[row].version} | {row.what} | {rows[row].passes} | `{row.file}` |\n"
    TABLE.write_text(text, encoding="utf-8")


class Ledger:
    """What is marked in the files of this run, and what came of it: a plugin of pytest."""

    def __init__(self, writes: bool) -> None:
        self._writes = writes
        self._outcomes: dict[str, str] = {}
        self._tests: dict[Row, list[str]] = {}
        self.files: set[str] = set()

    @property
    def marked(self) -> set[Row]:
        return set(self._tests)

    @pytest.hookimpl(tryfirst=True)  # also what `-m` and `-k` leave out is marked
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            self.files.add(item.path.name)
            if (row := row_of(item)) is not None:
                self._tests.setdefault(row, []).append(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self._outcomes.get(report.nodeid) != "failed" and (report.when == "call" or not report.passed):
            self._outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        if not self._writes:
            return
        before = read()
        after = {row: state for row, state in before.items() if row.file not in self.files and self._is_there(row)}
        for row, tests in self._tests.items():
            outcomes = [self._outcomes[test] for test in tests if test in self._outcomes]
            after[row] = state_of(row, outcomes) if outcomes else before.get(row) or state_of(row, [])
        write(after)

    @staticmethod
    def _is_there(row: Row) -> bool:
        return Path(__file__).with_name(row.file).exists()


def begin(config: Any) -> Ledger:
    """Take the marks of this run down."""
    writes = config.getoption("--write-table")
    if writes and config.getoption("numprocesses", None):
        raise pytest.UsageError("--write-table is for a run in one process, without -n")
    config.addinivalue_line("markers", "shows(library, what): a row of docs/ecosystem.md")
    ledger = Ledger(writes)
    config.pluginmanager.register(ledger, "ledger")
    return ledger
