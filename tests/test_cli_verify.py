"""`splice verify`: the same answer as a load, from the base's config alone; and what engines take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import splice
from splice.checkpoint.engines import engines
from splice.cli.engines import asked
from splice.cli.opened import open_adapter
from splice.cli.summary import look_into
from splice.cli.verifying import verify
from tests import bases
from tests.broken import Parts, bert, edited, llama, parts
from tests.cli import BASE, EXAMPLE, run, run_json
from tests.hub import Hub
from tests.samples import Case, network_cases, option_cases, plain_cases


def config_alone(network: Any, folder: Path, **changes: Any) -> Path:
    """A folder with the config of a base, and nothing else."""
    for name, value in changes.items():
        setattr(network.config, name, value)
    network.config.save_pretrained(folder)
    return folder


CASES = [*plain_cases(bases.LLAMA), *option_cases(bases.LLAMA), *network_cases(bases.LLAMA)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_can_be_loaded_fits(case: Case, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(case.base, case.config())
    base = config_alone(case.base.build(), tmp_path / "base")
    found = verify(str(folder), None, None, str(base), None)
    assert found.refusal == ""
    assert found.base == "LlamaForCausalLM"


def test_what_it_says() -> None:
    ran = run("verify", EXAMPLE, "--base", BASE, new_process=True)
    assert (ran.code, ran.out) == (
        0,
        f"{EXAMPLE} fits LlamaForCausalLM ({BASE}): 56 of 56 tensors on 28 layers\n",
    )


def test_no_weight_of_the_base_is_read(tmp_path: Path) -> None:
    base = config_alone(llama(), tmp_path / "base")
    (base / "model.safetensors").write_text("no weights")
    found = verify(str(parts().write(tmp_path / "adapter")), None, None, str(base / "config.json"), None)
    assert (found.refusal, found.placed, found.tensors, found.layers) == ("", 8, 8, 4)


def test_every_reason_is_told(tmp_path: Path) -> None:
    adapter = parts()
    adapter.tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(3, 16)
    del adapter.tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"]
    folder, base = adapter.write(tmp_path / "adapter"), config_alone(llama(layers=1), tmp_path / "base")
    code, told = run_json("verify", folder, "--base", base)
    assert code == 1 and told["fits"] is False
    assert told["missing"] == ["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"]
    assert told["mismatched"] == ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert len(told["unexpected"]) == 4
    with pytest.raises(splice.AdapterMismatchError) as caught:
        splice.PeftModel.from_pretrained(llama(layers=1), folder)
    error = caught.value
    assert (error.missing, error.unexpected, error.mismatched) == tuple(
        told[name] for name in ("missing", "unexpected", "mismatched")
    )
    ran = run("verify", folder, "--base", base)
    assert ran.code == 1 and "does not fit LlamaForCausalLM" in ran.out and "layers.1.self_attn" in ran.out


def test_another_architecture(tmp_path: Path) -> None:
    base = config_alone(bases.GPT2.build(), tmp_path / "base")
    found = verify(str(parts().write(tmp_path / "adapter")), None, None, str(base), None)
    assert found.base == "GPT2LMHeadModel" and "q_proj" in found.refusal


def test_a_config_that_cannot_be_applied(tmp_path: Path) -> None:
    folder = edited(parts().write(tmp_path / "adapter"), target_modules="(", rank_pattern={})
    found = verify(str(folder), None, None, str(config_alone(llama(), tmp_path / "base")), None)
    assert "regular expression" in found.refusal


@pytest.mark.parametrize("labels", [3, 5])
def test_the_head_of_a_classifier_is_as_large_as_the_adapters_own(labels: int, tmp_path: Path) -> None:
    adapter = parts(network=bert(labels), target_modules=["query"], task_type="SEQ_CLS").write(tmp_path / "adapter")
    base = config_alone(bert(), tmp_path / "base")
    assert verify(str(adapter), None, None, str(base), None).refusal == ""
    refusal = verify(str(adapter), None, None, str(base), 7).refusal
    assert f"({labels}," in refusal and "(7," in refusal


def test_a_base_of_the_hub(tmp_path: Path, hub: Hub) -> None:
    hub.repository("someone/base").commit(config_alone(llama(), tmp_path / "base"))
    hub.repository("someone/adapter").commit(parts().write(tmp_path / "adapter"))
    options = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost"}
    ran = run("verify", "someone/adapter", "--base", "someone/base", **options, HF_HUB_DISABLE_XET="1")
    assert ran.code == 0 and "8 of 8 tensors" in ran.out, ran.err


def test_values_of_the_adapter(tmp_path: Path) -> None:
    adapter = parts()
    next(iter(adapter.tensors.values()))[0, 0] = torch.inf
    folder = adapter.write(tmp_path / "adapter")
    assert run("verify", folder, "--base", config_alone(llama(), tmp_path / "base")).code == 0
    ran = run("verify", folder, "--engine", "vllm", "--values")
    assert ran.code == 1 and "problem: 1 tensor with values that are NaN or infinite" in ran.out


def test_a_base_that_is_not_there() -> None:
    ran = run("verify", EXAMPLE, "--base", "no/such/folder")
    assert (ran.code, ran.out) == (1, "")
    assert "splice: there is no base at 'no/such/folder'" in ran.err
    assert run("verify", EXAMPLE).code == 2


# -- engines


def reasons(engine: str, adapter: Parts, folder: Path) -> str:
    return "\n".join(asked(engine, look_into(open_adapter(str(adapter.write(folder))))).reasons)


@pytest.mark.parametrize("engine", sorted(engines()))
def test_every_engine_serves_a_plain_adapter(engine: str, tmp_path: Path) -> None:
    assert reasons(engine, parts(), tmp_path) == ""


@pytest.mark.parametrize("engine", sorted(engines()))
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora=True: it does not support DoRA"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules that are saved whole, and that it leaves out: lm_head"),
        ({"lora_bias": True}, "lora_B.bias"),
    ],
)
def test_what_no_engine_serves(engine: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    network = bases.GPT2.build() if "bias" in changes or "lora_bias" in changes else None
    targets = {"target_modules": ["c_attn"]} if network is not None else {}
    assert said in reasons(engine, parts(network=network, **targets, **changes), tmp_path)


def test_what_single_engines_do_not_serve(tmp_path: Path) -> None:
    assert "rank 600: the largest that it can be set to is 512" in reasons("vllm", parts(r=600), tmp_path / "a")
    assert "use_rslora=True" in reasons("sglang", parts(use_rslora=True), tmp_path / "b")
    for engine in ("sglang", "vllm"):
        said = reasons(engine, parts(alpha_pattern={"v_proj": 3}), tmp_path / engine)
        assert "alpha_pattern={'v_proj': 3}: it scales every layer" in said
    assert reasons("vllm", parts(use_rslora=True), tmp_path / "c") == ""
    assert reasons("llama.cpp", parts(rank_pattern={"v_proj": 2}), tmp_path / "d") == ""
    strange = parts(network=bases.GPT2.build(), target_modules=["c_attn"])
    assert "1 module that it puts no adapter on: c_attn" in reasons("sglang", strange, tmp_path / "e")


def test_what_an_engine_has_to_be_told(tmp_path: Path) -> None:
    answer = asked("vllm", look_into(open_adapter(str(parts(r=20).write(tmp_path)))))
    assert answer.notes == ("start it with --max-lora-rank 32: it takes ranks up to 16 without",)


def test_other_methods_are_not_served(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(bases.LLAMA, {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []})
    ran = run("verify", folder, "--engine", "vllm")
    assert ran.code == 1 and "vllm serves adapters of LORA, and this is one of IA3" in ran.out
    _, told = run_json("verify", folder, "--engine", "vllm")
    assert told["engine"]["serves"] is False and len(told["engine"]["reasons"]) == 1
