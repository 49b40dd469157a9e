"""Adapters written as those of another method: as near as they say, on every method that changes weights."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splice
from splice.converting_files import convert_files
from splice.errors import PeftError, UnsupportedFeatureError
from splice.merging_files import merge_files
from tests import bases
from tests.bases import run
from tests.cli import BASE, EXAMPLE, run_json
from tests.cli import run as run_program
from tests.comparing import assert_close
from tests.samples import Case, network_cases, plain_cases

TO = "LORA"


def cases() -> list[Case]:
    return [case for case in plain_cases(bases.LLAMA, bases.GPT2) if case.sample.merges]


def updates_of(model: Any, base: nn.Module) -> dict[str, torch.Tensor]:
    """What merging changes each parameter of `base` by."""
    merged = model.merge_and_unload().state_dict()
    return {name: merged[name] - p.detach() for name, p in base.named_parameters() if not torch.equal(merged[name], p)}


@pytest.mark.parametrize("case", cases(), ids=str)
def test_it_does_the_same(case: Case, shared_checkpoint: Any, tmp_path: Path) -> None:
    """With a small error the outputs are those of the adapter; with a rank the errors are those that are told."""
    adapter, network = shared_checkpoint(case.base, case.config()), case.base.build()
    network.save_pretrained(tmp_path / "base")
    model = splice.PeftModel.from_pretrained(case.base.build(), adapter)
    if not all(layer.mergeable for layers in model.base_model.placed.values() for layer in layers.values()):
        pytest.skip("cannot be merged")
    try:
        converted = convert_files(adapter, tmp_path / "base", tmp_path / "near", TO, error=1e-4)
    except UnsupportedFeatureError as error:
        assert "changes" in str(error)  # noqa: PT017
        assert not (tmp_path / "near").exists()
        return
    assert converted.largest_error <= 1.0001e-4
    inputs = case.base.inputs(3)
    expected = run(model, inputs)
    near = splice.PeftModel.from_pretrained(case.base.build(), tmp_path / "near")
    assert near.peft_config["default"].peft_type == TO
    assert_close(run(near, inputs), expected, factor=1000)

    coarse = convert_files(adapter, tmp_path / "base", tmp_path / "coarse", TO, rank=1)
    exact = updates_of(model, network)
    got = updates_of(splice.PeftModel.from_pretrained(case.base.build(), tmp_path / "coarse"), network)
    for layer in coarse.layers:
        update = exact.get(f"{layer.path}.weight")
        if update is None or not layer.rank:
            continue
        error = (update - got[f"{layer.path}.weight"]).norm() / update.norm()
        assert layer.rank == 1 and layer.error == pytest.approx(float(error), abs=2e-4)
        best = torch.linalg.svdvals(update)[1:].norm() / update.norm()
        assert layer.error == pytest.approx(float(best), abs=2e-4)


@pytest.mark.parametrize("case", network_cases(bases.LLAMA), ids=str)
def test_what_changes_no_weights_is_refused_by_name(case: Case, shared_checkpoint: Any, tmp_path: Path) -> None:
    adapter = shared_checkpoint(case.base, case.config())
    case.base.build().save_pretrained(tmp_path / "base")
    for make in (convert_files, lambda adapter, base, out: merge_files(base, [adapter], out)):
        with pytest.raises(
            NotImplementedError, match=f"an adapter of {case.method.name.value} changes no weights, so that"
        ):
            make(adapter, tmp_path / "base", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_layers_too_large_to_be_decomposed_whole(tmp_path: Path) -> None:
    """Of these only the largest singular values are looked for, more and more until the error is small enough."""
    torch.manual_seed(0)
    base = bases.LLAMA.build()
    config = type(base.config)(
        **{**base.config.to_dict(), "hidden_size": 768, "intermediate_size": 640, "head_dim": 192}
    )
    network = type(base)(config)
    network.save_pretrained(tmp_path / "base")
    model = splice.get_peft_model(
        network, splice.LoHaConfig(r=6, alpha=6, target_modules=["up_proj"], init_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    state = torch.random.get_rng_state()
    converted = convert_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", TO)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {layer.rank for layer in converted.layers} <= set(range(2, 37)) and converted.largest_error <= 0.01
    exact = updates_of(model, network)
    got = updates_of(splice.PeftModel.from_pretrained(copy.deepcopy(network), tmp_path / "out"), network)
    for name, update in exact.items():
        assert (update - got[name]).norm() <= 0.0101 * update.norm()


def test_a_config_alone_is_enough_where_no_weight_is_needed(tmp_path: Path) -> None:
    network = bases.LLAMA.build()
    network.config.save_pretrained(tmp_path / "base")
    fields = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**fields, "architectures": [type(network).__name__]}))
    model = splice.get_peft_model(network, splice.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False))
    model.save_pretrained(tmp_path / "loha")
    assert convert_files(tmp_path / "loha", tmp_path / "base", tmp_path / "one", TO).largest_error < 0.01

    model = splice.get_peft_model(
        bases.LLAMA.build(), splice.HRAConfig(r=2, target_modules=["q_proj"], init_weights=False)
    )
    model.save_pretrained(tmp_path / "hra")
    with pytest.raises(UnsupportedFeatureError, match=r"depends on the base's weights, and .* holds none"):
        convert_files(tmp_path / "hra", tmp_path / "base", tmp_path / "two", TO)
    assert not (tmp_path / "two").exists()


def test_what_is_asked_for_wrongly(tmp_path: Path) -> None:
    with pytest.raises(PeftError, match="nothing can be converted to 'IA3'; it can be to LORA"):
        convert_files(EXAMPLE, BASE, tmp_path / "out", "IA3")
    with pytest.raises(PeftError, match="give a rank or an error, not both"):
        convert_files(EXAMPLE, BASE, tmp_path / "out", TO, rank=2, error=0.1)
    with pytest.raises(PeftError, match="a rank is at least 1, and got 0"):
        convert_files(EXAMPLE, BASE, tmp_path / "out", TO, rank=0)
    with pytest.raises(PeftError, match="an error is between 0 and 1"):
        convert_files(EXAMPLE, BASE, tmp_path / "out", TO, error=2.0)
    shutil.copytree(EXAMPLE, tmp_path / "there")
    with pytest.raises(FileExistsError, match="there holds an adapter already"):
        convert_files(EXAMPLE, BASE, tmp_path / "there", TO)


def test_prompts_change_no_weight(tmp_path: Path) -> None:
    model = splice.get_peft_model(
        bases.LLAMA.build(), splice.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    model.save_pretrained(tmp_path / "adapter")
    bases.LLAMA.build().save_pretrained(tmp_path / "base")
    with pytest.raises((NotImplementedError, UnsupportedFeatureError)):
        convert_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", TO)


def test_nothing_is_written_for_an_adapter_that_does_nothing(tmp_path: Path) -> None:
    model = splice.get_peft_model(bases.LLAMA.build(), splice.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    bases.LLAMA.build().save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedFeatureError, match="adds zeros to every layer"):
        convert_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", TO)
    assert not (tmp_path / "out").exists()


def test_the_program(tmp_path: Path) -> None:
    ran = run_program("convert", EXAMPLE, "--base", BASE, "--out", tmp_path / "one", "--rank", "2", new_process=True)
    assert ran.code == 0 and "rank 2, largest error" in ran.out and "relative error" in ran.out
    code, told = run_json("convert", EXAMPLE, "--base", BASE, "--out", tmp_path / "two", "--error", "0.001")
    assert code == 0 and 0 <= told["largest_error"] <= 0.001
    assert all(layer["rank"] <= 4 for layer in told["layers"])
    assert run_program("convert", EXAMPLE, "--base", BASE, "--out", tmp_path / "three", "--rank", "many").code == 2
