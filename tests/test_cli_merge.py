"""`splice merge`: adapters merged into the files of their base, by the program."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import splice
from tests.cli import BASE, EXAMPLE, Ran, run, run_json
from tests.test_merging_files import tensors_of


def complaints(ran: Ran) -> list[str]:
    """What the program itself complained of: libraries that are imported may do so too."""
    return [line for line in ran.err.splitlines() if line.startswith("splice: ")]


def test_one_adapter(tmp_path: Path) -> None:
    ran = run("merge", "--base", BASE, "--adapter", EXAMPLE, "--out", tmp_path / "out", new_process=True)
    assert (ran.code, complaints(ran)) == (0, [])
    assert ran.out.startswith(f"{tmp_path / 'out'}: ") and ran.out.rstrip().endswith("tensors changed")
    model = splice.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), EXAMPLE).merge_and_unload()
    model.save_pretrained(tmp_path / "memory")
    expected, got = tensors_of(tmp_path / "memory"), tensors_of(tmp_path / "out")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())

    again = run("merge", "--base", BASE, "--adapter", EXAMPLE, "--out", tmp_path / "out")
    assert again.code == 1 and "out exists already, and nothing there is overwritten" in again.err


def test_several_and_json(tmp_path: Path) -> None:
    two = EXAMPLE.parent / "sort"
    arguments = (
        "merge",
        "--base",
        BASE,
        "--adapter",
        EXAMPLE,
        "--adapter",
        two,
        "--weights",
        "0.5,0.25",
        "--dtype",
        "bfloat16",
    )
    code, told = run_json(*arguments, "--out", tmp_path / "out")
    assert code == 0 and told["changed_tensors"] and told["resumed"] == []
    tensors = tensors_of(tmp_path / "out")
    assert told["bytes"] > sum(t.numel() * t.element_size() for t in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_wrong_calls(tmp_path: Path) -> None:
    ran = run("merge", "--base", BASE, "--adapter", EXAMPLE, "--weights", "1,2", "--out", tmp_path / "out")
    assert ran.code == 2 and "--weights has 2 numbers, and there are 1 adapters" in ran.err
    ran = run("merge", "--base", BASE, "--adapter", EXAMPLE, "--weights", "many", "--out", tmp_path / "out")
    assert ran.code == 2 and "--weights takes numbers with commas between" in ran.err
    assert run("merge", "--base", BASE, "--out", tmp_path / "out").code == 2


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    ran = run("merge", "--base", tmp_path / "nothing", "--adapter", EXAMPLE, "--out", tmp_path / "out")
    assert ran.code == 1 and complaints(ran) == [f"splice: {tmp_path / 'nothing'} is no folder"]
    shutil.copytree(EXAMPLE, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"nothing")
    ran = run("merge", "--base", BASE, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert ran.code == 1 and len(complaints(ran)) == 1 and "damaged" in complaints(ran)[0]
    assert not (tmp_path / "out").exists()
