"""The benchmarks of fleets: what they found is kept, drawn and written into their page; small runs of them work."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from benchmarks import among, batches, fleet, replay
from benchmarks.among import STEPS, Among
from benchmarks.batches import WAYS, Batch
from benchmarks.fleet import Found
from benchmarks.gpu import graphs_made
from benchmarks.models import REFERENCE, SPLICE
from benchmarks.replay import Replay
from benchmarks.report import Row, line, row

ROOT = Path(__file__).parents[1]
FOUND = Found(
    "a machine",
    "2026-11-30",
    1.5,
    [
        Among(library, count, dict.fromkeys(STEPS, seconds * count))
        for library, counts, seconds in ((REFERENCE, (1, 10), 0.25), (SPLICE, (1, 10, 1000), 5e-6))
        for count in counts
    ],
    [Batch(32, adapters, 1, dict(zip(WAYS, (0.01, 0.1, 0.03, 0.02)))) for adapters in (1, 8)],
    Replay(2000, 64, 960, 0.45, [index / 200 * 0.02 for index in range(201)], 0.012, 300.0, 400.0),
)


def kept(folder: Path, found: Found = FOUND) -> Path:
    """A folder with what a run found, and a page with a place for it."""
    (folder / fleet.FIGURES).write_text(fleet.as_text(found), encoding="utf-8")
    page = folder / fleet.PAGE
    page.write_text(f"before\n{fleet.BEGIN}\nold\n{fleet.END}\nafter\n", encoding="utf-8")
    return page


def test_what_was_kept_is_read() -> None:
    assert fleet.from_text(fleet.as_text(FOUND)) == FOUND


def test_the_page_is_written_between_its_marks_and_again(tmp_path: Path) -> None:
    page = kept(tmp_path)
    fleet.write(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{fleet.BEGIN}\n") and text.endswith(f"{fleet.END}\nafter\n")
    assert "old" not in text and "Measured on 30 November 2026: a machine; the machine's load was 1.5. Medians." in text
    assert "|  | reference beside 1 | 10 | splice beside 1 | 10 | 1,000 |" in text
    assert "| load_adapter | 250 ms | 2.5 s | 5 us | 50 us | 5 ms |" in text
    assert "| 32 | 1 | 8 | 10 ms | 100 ms | 30 ms | 20 ms |" in text
    assert "| time to adapter, 99 % of all requests | 19.8 ms |" in text
    drawn = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    fleet.write(tmp_path)
    assert page.read_text(encoding="utf-8") == text
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")} == drawn
    assert sorted(drawn) == sorted(re.findall(r"\]\((.*?\.svg)\)", text))


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = kept(tmp_path)
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="README.md needs one place for the figures of fleets, between '<!-- fleet"):
        fleet.write(tmp_path)
    assert page.read_text(encoding="utf-8") == "nothing" and not list(tmp_path.glob("*.svg"))


def test_pictures_are_white_behind_and_large_enough(tmp_path: Path) -> None:
    kept(tmp_path)
    for path in fleet.write(tmp_path):
        if path.suffix == ".svg":
            picture = ElementTree.parse(path).getroot()
            assert float(picture.attrib["width"].removesuffix("pt")) > 600
            assert "fill: #ffffff" in path.read_text(encoding="utf-8")


def test_the_page_of_the_project_is_of_the_figures_that_are_kept() -> None:
    """`make fleet-plots` writes both."""
    folder = ROOT / "benchmarks"
    page = (folder / fleet.PAGE).read_text(encoding="utf-8")
    assert fleet.with_tables(page, fleet.read(folder)) == page
    assert all((folder / name).exists() for name in re.findall(r"\]\((.*?\.svg)\)", page))


def test_rows_say_nothing_where_the_reference_was_stopped() -> None:
    lines = [line(one) for one in among.rows(FOUND.among)]
    (beside,) = [told for told in lines if told.startswith("beside 1,000: load_adapter")]
    assert beside.split()[-2:] == ["5,000", "us"]
    assert any(told.startswith("beside 10: load_adapter") and told.endswith("50,000x") for told in lines)
    assert line(row("what", 2, 1, "ms")).split() == ["what", "2", "ms", "1", "ms", "2x"]
    assert "MISSED" in line(Row("what", math.nan, 1, "graphs", math.nan).at_most(0))
    assert "ok" in line(Row("what", math.nan, 0, "graphs", math.nan).at_most(0))


def test_rows_of_batches_and_of_the_replay() -> None:
    told = [line(one) for one in batches.rows(FOUND.batches[:1])]
    assert [one.split("  ")[0] for one in told] == [
        "batch of 32 rows, 1 adapter, 1 token each",
        "batch of 32 rows, 1 adapter, 1 token each: in slots",
        "- in times of one merged adapter",
    ]
    found = {one.what.partition(": ")[2]: one for one in replay.rows(FOUND.replay)}
    assert found["time to adapter, p99"].ours == pytest.approx(19.8)
    # More is better in every row: with two thirds of the tokens.
    slower = replace(FOUND.replay, tokens_per_second=200.0)
    assert [one.ratio for one in replay.rows(slower)][-1] == 0.5
    assert asdict(slower)["single"] == 400.0


def test_compiled_graphs_are_counted() -> None:
    step = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with graphs_made() as made:
        for size in (3, 3, 4):
            step(torch.ones(size))
    assert (made.compiled, made.captured) == (2, 0)
    with graphs_made() as made:
        step(torch.ones(4))
    assert made.compiled == 0
    torch._dynamo.reset()


def run_module(*arguments: str) -> str:
    paths = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_small_run_of_fleets_works_and_keeps_nothing() -> None:
    before = (ROOT / "benchmarks" / fleet.FIGURES).read_bytes()
    told = run_module("benchmarks", "--small", "--only", "fleet")
    for what in (*STEPS.values(), "in slots", "time to adapter, p99", "tokens a second"):
        assert what in told
    assert (ROOT / "benchmarks" / fleet.FIGURES).read_bytes() == before


@pytest.mark.slow
def test_the_benchmarks_for_gpus_work_dry() -> None:
    told = run_module("benchmarks.gpu", "--dry")
    for what in ("graphs compiled", "CUDA graphs captured"):
        (counted,) = [one for one in told.splitlines() if what in one]
        assert counted.endswith("ok") and " 0 graphs" in counted


def test_no_pictures_of_a_small_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--small", "--plots"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "the figures of a small run mean nothing" in done.stderr
