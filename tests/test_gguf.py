"""Adapters as llama.cpp reads them: each layer is changed as by the adapter, and llama.cpp itself computes the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import splice
from splice.checkpoint.engines import engines
from splice.checkpoint.unread import made
from splice.cli.commands.convert import command
from splice.cli.engines import asked as asked_of
from splice.cli.opened import open_adapter
from splice.cli.summary import look_into
from splice.errors import PeftError, UnsupportedFeatureError
from splice.methods.lora.written.factors import REFUSED, Factors
from splice.methods.lora.written.llama_cpp import _ARCHITECTURES, pairs_together
from splice.methods.lora.written.scales import Scale
from splice.methods.lora.written.stacked_experts import stacked_in
from tests import bases
from tests.broken import parts
from tests.cli import BASE, EXAMPLE
from tests.llama_cpp import TOKENS, in_llama_cpp, small, write_base
from tests.test_stacked_experts import MIXTRAL, adapter, all_names
from tests.test_stacked_experts import pytestmark as needs_stacks

gguf = pytest.importorskip("gguf")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def adapted(network: nn.Module, folder: Path, **options: Any) -> Any:
    """A model with an adapter that changes much, saved in `folder`; its base beside it."""
    network.save_pretrained(folder / "base")  # type: ignore[operator]
    model = splice.get_peft_model(network, splice.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.15
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return model.eval()


SCALES = {
    "r": 4,
    "lora_alpha": 6,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"down_proj": 3, "gate.weight": 2},
}


def test_each_layer_is_changed_as_by_the_adapter(tmp_path: Path) -> None:
    """The product of the factors, scaled as llama.cpp does it, is the adapter's, but for the order of rows of q and k."""
    model = adapted(small("LlamaForCausalLM"), tmp_path, target_modules=[*LINEAR, "embed_tokens"], **SCALES)
    told = splice.translate_files(tmp_path / "adapter", tmp_path / "out", "gguf", base=tmp_path / "base")
    assert told.place == tmp_path / "out" / "adapter.gguf" and told.parts[0].layers == 13
    reader = gguf.GGUFReader(told.place)
    said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF")}
    assert (said["general.type"], said["adapter.type"], said["general.architecture"]) == ("adapter", "lora", "llama")
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert len(tensors) == 26
    for path, module in model.base_model.model.named_modules():
        if path.rpartition(".")[2] not in [*LINEAR, "embed_tokens"]:
            continue
        exact = module.get_delta_weight("default").detach()
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        a, b = (torch.tensor(tensors[f"{name}.lora_{letter}"]) for letter in "ab")
        delta = said["adapter.lora.alpha"] / b.shape[1] * (a @ b.T if "embed" in path else b @ a)
        heads = {"q_proj": 4, "k_proj": 2}.get(path.rpartition(".")[2])
        if heads:
            # Back as transformers has it: the halves of the pairs of each head one after the other.
            delta = delta.reshape(heads, -1, 2, delta.shape[1]).transpose(1, 2).reshape(delta.shape)
        assert torch.allclose(delta, exact, atol=1e-5), path


def test_one_scale_for_all_leaves_the_bytes(tmp_path: Path) -> None:
    model = adapted(small("LlamaForCausalLM"), tmp_path, target_modules=["v_proj"], r=4, lora_alpha=6)
    told = splice.translate_files(
        tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base" / "config.json"
    )
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(told.place).tensors}
    own = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    assert np.array_equal(tensors["blk.1.attn_v.weight.lora_b"], own.lora_B["default"].weight.detach().numpy())
    assert np.array_equal(tensors["blk.1.attn_v.weight.lora_a"], own.lora_A["default"].weight.detach().numpy())


def test_tokens_that_switch_it_on(tmp_path: Path) -> None:
    adapted(small("LlamaForCausalLM"), tmp_path, target_modules=["v_proj"], r=2, alora_invocation_tokens=[7, 8])
    place = splice.translate_files(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base").place
    assert gguf.GGUFReader(place).fields["adapter.alora.invocation_tokens"].contents() == [7, 8]


# -- llama.cpp itself


QUICK = ("LlamaForCausalLM", "GPT2LMHeadModel")
# Of Gemma 3 for pictures the part for text is that of the other.
OTHERS = sorted(name for name in _ARCHITECTURES if "Conditional" not in name and name not in QUICK)
# Stacked experts, and the router before them.
STACKED = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"]}


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_llama_cpp_computes_the_same(family: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    network = small(family)
    write_base(network, tmp_path / "base.gguf")
    with torch.no_grad():
        base = network(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)
    targets = [*LINEAR, "embed_tokens", "lm_head"] if family == "LlamaForCausalLM" else "all-linear"
    options = STACKED if re.search("Moe|Mixtral", family) else {"target_modules": targets}
    model = adapted(network, tmp_path, **options, **SCALES)
    with torch.no_grad():
        exact = model(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)
    file = splice.translate_files(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base").place
    assert torch.allclose(in_llama_cpp(tmp_path / "base.gguf", None), base, atol=0.01)
    assert torch.allclose(in_llama_cpp(tmp_path / "base.gguf", file), exact, atol=0.01)
    assert (base - exact).abs().max() > 0.1


@needs_stacks
def test_experts_that_were_layers(tmp_path: Path) -> None:
    """Of an adapter from before transformers 5: each expert is changed as it was then."""
    folder, merged = adapter(MIXTRAL, all_names(MIXTRAL), tmp_path / "old")
    MIXTRAL.build().save_pretrained(tmp_path / "base")
    place = splice.translate_files(folder, tmp_path / "a.gguf", "gguf", base=tmp_path / "base").place
    reader = gguf.GGUFReader(place)
    tensors = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    for block, (new, old) in enumerate(zip(merged.model.layers, MIXTRAL.build().model.layers, strict=True)):
        delta = (new.mlp.experts.gate_up_proj - old.mlp.experts.gate_up_proj).detach().chunk(2, dim=1)
        exact = {
            "gate": delta[0],
            "up": delta[1],
            "down": (new.mlp.experts.down_proj - old.mlp.experts.down_proj).detach(),
        }
        for role, each in exact.items():
            a, b = (tensors[f"blk.{block}.ffn_{role}_exps.weight.lora_{letter}"] for letter in "ab")
            assert torch.allclose(alpha / b.shape[2] * (b @ a), each, atol=1e-5), role


# -- what cannot be written


def test_pairs_are_those_of_the_heads() -> None:
    assert pairs_together(8, 2, "q").tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    with pytest.raises(PeftError, match="q: 10 rows are not those of 4 heads"):
        pairs_together(10, 4, "q")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "no place for use_dora=True: .*`splice convert --to lora`"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight', a part of the base that is saved whole; .*`splice merge`"),
        ({"use_qalora": True}, "no place for use_qalora=True: A is for averaged inputs; .*`splice convert --to lora`"),
    ],
)
def test_what_is_more_than_two_factors(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    adapted(small("LlamaForCausalLM"), tmp_path, target_modules=["q_proj"], **options)
    with pytest.raises(UnsupportedFeatureError, match=said):
        splice.translate_files(tmp_path / "adapter", tmp_path / "out", "gguf", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


@needs_stacks
def test_verify_knows_that_experts_can_be_written(tmp_path: Path) -> None:
    adapted(small("Qwen3MoeForCausalLM"), tmp_path, **STACKED)
    answer = asked_of("llama.cpp", look_into(open_adapter(str(tmp_path / "adapter"))))
    assert answer.reasons == () and answer.notes[0].startswith("target_parameters: convert it with `splice convert")


def test_stacks_that_cannot_be_told(tmp_path: Path) -> None:
    fields = {"target_parameters": ["experts.down_proj"], "r": 2, "lora_alpha": 2}
    pair = Factors({"lora_A.weight": made(torch.ones(6, 4)), "lora_B.weight": made(torch.ones(5, 6))}, Scale(6, 2.0))
    (only,) = stacked_in({"layers.0.mlp.experts": pair}, fields, 3)
    assert (only.role, only.factors.down.shape, only.factors.up.shape) == ("down", (3, 2, 4), (3, 5, 2))
    for layers, experts, said in (
        ({"layers.0.mlp.experts": pair}, None, "of so many experts as the base's config says .None"),
        ({"layers.0.mlp.experts": pair, "layers.0.mlp.experts.base_layer": pair}, 3, "its 2 pairs of factors"),
        ({"layers.0.mlp.experts": pair}, 4, "factors of 6 rows are not those of 4 experts"),
    ):
        with pytest.raises(UnsupportedFeatureError, match=said):
            list(stacked_in(layers, fields, experts))


def test_it_refuses_what_verify_refuses() -> None:
    limits = engines()["llama.cpp"]["LORA"]
    assert limits.refused.keys() == REFUSED.keys() - {"alora_invocation_tokens", "target_parameters"}


def test_scales_that_the_engine_s_own_program_does_not_know(tmp_path: Path) -> None:
    folder = parts(use_rslora=True, alpha_pattern={"v_proj": 3}).write(tmp_path)
    answer = asked_of("llama.cpp", look_into(open_adapter(str(folder))))
    assert answer.reasons == () and len(answer.notes) == 2
    assert "use_rslora: convert it with `splice convert --to gguf`" in answer.notes[0]


def test_output_layers_that_are_the_embeddings(tmp_path: Path) -> None:
    network = small("LlamaForCausalLM")
    network.config.tie_word_embeddings = True
    adapted(network, tmp_path, target_modules=["embed_tokens"])
    with pytest.raises(UnsupportedFeatureError, match="embeddings are its output layer too"):
        splice.translate_files(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_other_methods_and_bases(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(bases.LLAMA, {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []})
    bases.LLAMA.build().save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedFeatureError, match=r"this is one of IA3: .*`splice convert --to lora`"):
        splice.translate_files(folder, tmp_path / "out", "gguf", base=tmp_path / "base")
    with pytest.raises(PeftError, match="gguf names layers by the base's architecture: give the base"):
        splice.translate_files(folder, tmp_path / "out", "gguf")
    t5 = bases.T5.build()
    t5.save_pretrained(tmp_path / "t5")
    folder = checkpoint(bases.T5, {"peft_type": "LORA", "target_modules": ["q"]})
    with pytest.raises(UnsupportedFeatureError, match=r"converts the weights of T5\w+ is not known here"):
        splice.translate_files(folder, tmp_path / "out", "gguf", base=tmp_path / "t5")


def test_another_base_than_the_adapter_is_for(tmp_path: Path) -> None:
    adapted(small("LlamaForCausalLM"), tmp_path, target_modules=["q_proj"])
    bases.LLAMA.build().save_pretrained(tmp_path / "other")
    with pytest.raises(splice.AdapterMismatchError):
        splice.translate_files(tmp_path / "adapter", tmp_path / "out", "gguf", base=tmp_path / "other")


def test_the_program(tmp_path: Path) -> None:
    place = tmp_path / "reverse.gguf"
    asked = [str(EXAMPLE), "--to", "gguf", "--base", str(BASE), "--out", str(place)]
    ran = CliRunner().invoke(command, asked)
    assert ran.exit_code == 0 and ran.output.startswith(f"{place}: gguf, was peft\n  28 layers, 56 tensors\n"), (
        ran.output
    )
    assert {tensor.name.rpartition(".")[2] for tensor in gguf.GGUFReader(place).tensors} == {"lora_a", "lora_b"}
    assert isinstance(CliRunner().invoke(command, asked).exception, FileExistsError)
