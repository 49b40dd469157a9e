"""docs/ecosystem.md says what the tests show, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ecosystem import table


def test_each_marked_test_has_its_row_and_each_row_its_test(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-table"):
        pytest.skip("it is being written")
    ledger = request.config.pluginmanager.get_plugin("ledger")
    written = set(table.read())
    assert ledger.marked - written == set(), "run these files with --write-table"
    here = {row for row in written if row.file in ledger.files or not Path(__file__).with_name(row.file).exists()}
    assert here - ledger.marked == set(), "these rows have no test: run their files with --write-table"


def test_every_row_passes_or_was_not_run() -> None:
    assert {row: state for row, state in table.read().items() if state.passes == table.FAILS} == {}


def test_what_is_written_is_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = {
        table.Row("torch", "`torch.compile`, whole", "test_a.py"): table.State("2.13", table.PASSES),
        table.Row("accelerate", "two processes", "test_b.py"): table.State("1.15", table.NOT_RUN),
    }
    monkeypatch.setattr(table, "TABLE", tmp_path / "table.md")
    table.write(rows)
    assert table.read() == rows


@pytest.mark.parametrize(
    ("outcomes", "passes"),
    [(["passed", "passed"], "yes"), (["passed", "failed"], "**no**"), (["passed", "skipped"], "yes"), ([], "not run")],
)
def test_a_row_of_several_tests_passes_if_none_failed(outcomes: list[str], passes: str) -> None:
    assert table.state_of(table.Row("torch", "", ""), outcomes).passes == passes
