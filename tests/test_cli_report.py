"""`splice inspect --plot` and `--report`: the pictures show what the numbers are, and the page needs nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
import torch

from splice.cli import plot
from splice.cli.grid import grid_of
from splice.cli.opened import open_adapter
from splice.cli.summary import look_into
from splice.cli.updates import effective_rank, updates_of
from tests import bases
from tests.broken import parts
from tests.cli import EXAMPLE, run
from tests.samples import Case, kind_cases, network_cases

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def shown(page: Path, script: str = "") -> str:
    """The page as a browser has it once its own script has run, and then this one."""
    assert CHROMIUM is not None
    if script:
        page = page.with_name("with_script.html")
        page.write_text(
            page.with_name("report.html").read_text().replace("</body>", f"<script>{script}</script></body>")
        )
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, timeout=200
    )
    return done.stdout


@pytest.fixture
def report(tmp_path: Path) -> Path:
    ran = run("inspect", EXAMPLE, "--report", tmp_path / "report.html")
    assert ran.code == 0, ran.err
    return tmp_path / "report.html"


def test_the_page_has_every_layer_and_its_numbers(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    for update in updates_of(look_into(open_adapter(str(EXAMPLE)))):
        assert f'<td data-value="{update.layer.path}">' in text
        (tip,) = re.findall(rf'data-tip="({re.escape(update.layer.path)}\n[^"]*)"', text)
        assert f"norm of the update: {update.norm:.4g}" in tip
        assert f"effective rank: {effective_rank(update.singular_values):.2f} of 4" in tip
    assert text.count('class="cell"') == 28


def test_the_page_needs_no_network(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|<link|@import|\bsrc=|url\((?!#)", text)
    assert "default-src 'none'" in text


@in_a_browser
def test_what_a_reader_sees(report: Path) -> None:
    """Its text, a table that a click sorts, and what stands beside the pointer."""
    script = """
    const button = document.querySelectorAll("th button")[3];
    const norms = () => Array.from(document.querySelectorAll("tbody tr"), row => Number(row.cells[3].dataset.value));
    const sorted = (list, way) => list.every((value, i) => !i || way * (value - list[i - 1]) >= 0);
    button.click();
    document.body.dataset.down = sorted(norms(), -1);
    button.click();
    document.body.dataset.up = sorted(norms(), 1);
    const cell = document.querySelector(".cell");
    cell.dispatchEvent(new PointerEvent("pointermove", {clientX: 40, clientY: 40}));
    document.body.dataset.tip = document.getElementById("tip").textContent;
    document.body.dataset.shown = getComputedStyle(document.getElementById("tip")).display;
    """
    dom = shown(report, script)
    (body,) = re.findall(r"<body[^>]*>", dom)
    assert 'data-down="true"' in body and 'data-up="true"' in body and 'data-shown="block"' in body
    assert "model.layers.0.mlp.down_proj\nnorm of the update: 3.55" in unescape(body)
    text = unescape(re.sub(r"<[^>]+>", " ", dom.partition("<body")[2].partition("<script")[0]))
    for said in ("No problems found.", "34,816 in F32", "self_attn.q_proj", "effective rank"):
        assert said in text


def test_problems_stand_on_top(tmp_path: Path) -> None:
    adapter = parts()
    next(iter(adapter.tensors.values()))[0, 0] = torch.nan
    ran = run("inspect", adapter.write(tmp_path), "--report", tmp_path / "report.html")
    assert ran.code == 1
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    problem = text.index("1 tensor with values that are NaN or infinite")
    assert problem < text.index("<dl>") < text.index("<table")
    assert "norm of the update: not a number" in text


def test_names_are_text(tmp_path: Path) -> None:
    adapter = parts().renamed(lambda name: name.replace("self_attn", '<img src=x onerror="alert(1)">'))
    run("inspect", adapter.write(tmp_path), "--report", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img" not in text and "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in text


@pytest.mark.parametrize("case", [*kind_cases(), *network_cases(bases.LLAMA)], ids=str)
def test_every_method_has_a_grid(case: Case, checkpoint: Callable[..., Path]) -> None:
    summary = look_into(open_adapter(str(checkpoint(case.base, case.config()))))
    updates = list(updates_of(summary))
    grid = grid_of(updates)
    assert len(grid.cells) == len(updates) > 0
    assert all(update.norm > 0 for update in updates)


def test_layers_in_and_outside_of_blocks(tmp_path: Path) -> None:
    adapter = parts(target_modules=["q_proj", "lm_head"])
    grid = grid_of(updates_of(look_into(open_adapter(str(adapter.write(tmp_path))))))
    assert grid.rows == ("0", "1", "") and set(grid.columns) == {"self_attn.q_proj", "lm_head"}
    both = parts().renamed(lambda name: name.replace("model.layers.1", "encoder.blocks.10"))
    grid = grid_of(updates_of(look_into(open_adapter(str(both.write(tmp_path / "both"))))))
    assert grid.rows == ("encoder.blocks.10", "model.layers.0")


# -- plots


@pytest.mark.parametrize(("name", "start"), [("map.png", b"\x89PNG\r\n"), ("map.svg", b"<?xml")])
def test_a_plot(name: str, start: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        ran = run("inspect", EXAMPLE, "--plot", tmp_path / folder / name)
        assert ran.code == 0, ran.err
    assert (tmp_path / "a" / name).read_bytes().startswith(start)
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_plot_of_another_kind(tmp_path: Path) -> None:
    ran = run("inspect", EXAMPLE, "--plot", tmp_path / "map.gif")
    assert (ran.code, ran.out) == (1, "")
    assert "map.gif: a plot is a file of .png or .svg" in ran.err


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'splice\\[plots\\]'"):
        plot.check_plot(Path("map.png"))
