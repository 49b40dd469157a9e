"""`splice list`: the adapters below a folder and in the Hub's cache."""

from __future__ import annotations

from pathlib import Path

from tests.broken import CONFIG, parts
from tests.cli import ROOT, run, run_json


def test_the_adapters_below_a_folder() -> None:
    ran = run("list", "examples")
    assert (ran.code, ran.err) == (0, "")
    lines = [line.split() for line in ran.out.splitlines()]
    assert lines[0][:5] == ["adapter", "method", "rank", "parameters", "size"]
    assert [line[:4] for line in lines[1:]] == [
        [f"examples/skills/adapters/{name}", "LORA", "4", "34,816"] for name in ("reverse", "sort", "upper")
    ]


def test_one_that_cannot_be_read_has_its_line_too(tmp_path: Path) -> None:
    parts(rank_pattern={"v_proj": 2}).write(tmp_path / "a")
    parts().write(tmp_path / "b" / "inner")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / CONFIG).write_text("{")
    code, told = run_json("list", tmp_path)
    assert code == 1
    assert [Path(line["folder"]).relative_to(tmp_path).as_posix() for line in told] == ["a", "b/inner", "c"]
    assert [line.get("ranks") for line in told] == [[2, 4], [4], None]
    assert "is not valid JSON" in told[2]["error"]
    assert "cannot be read:" in run("list", tmp_path).out


def test_no_name_is_cut_off(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40) / ("name" * 20)
    adapter = parts()
    adapter.config["base_model_name_or_path"] = base = "someone/" + "base" * 30
    adapter.write(folder)
    for columns in ("80", "300"):
        out = run("list", tmp_path, COLUMNS=columns).out
        assert str(folder) in out and base in out


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    repository = tmp_path / "home" / "hub" / "models--someone--adapter"
    parts().write(repository / "snapshots" / commit)
    parts().write(repository / "snapshots" / commit / "sub")
    code, told = run_json("list", HF_HOME=str(tmp_path / "home"))
    assert code == 0
    assert [line["name"] for line in told] == ["someone/adapter@0123456", "someone/adapter@0123456 sub"]


def test_nothing_is_no_mistake(tmp_path: Path) -> None:
    assert run("list", tmp_path).out == f"no adapters below {tmp_path}\n"
    assert run_json("list", HF_HOME=str(tmp_path)) == (0, [])


def test_a_folder_that_is_not_there() -> None:
    ran = run("list", "nowhere", cwd=ROOT)
    assert ran.code == 2 and "'nowhere' does not exist" in ran.err
