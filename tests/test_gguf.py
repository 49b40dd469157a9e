"""Adapters as llama.cpp reads them: each layer is changed as by the adapter, and llama.cpp itself computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import splice
from splice.checkpoint.engines import engines
from splice.cli.engines import asked
from splice.cli.opened import open_adapter
from splice.cli.summary import look_into
from splice.errors import PeftError, UnsupportedFeatureError
from splice.methods.lora.written.factors import REFUSED
from splice.methods.lora.written.llama_cpp import pairs_together
from tests import bases
from tests.broken import parts
from tests.cli import BASE, EXAMPLE, ROOT, run

gguf = pytest.importorskip("gguf")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def small_llama(**fields: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _drawn(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=300,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                tie_word_embeddings=False,
                **fields,
            )
        )
    )


def small_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _drawn(GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64)))


def _drawn(network: nn.Module) -> nn.Module:
    """With weights that make the tokens differ in probability."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * 0.15
    return network.eval()


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


SCALES = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"down_proj": 3}}


def test_each_layer_is_changed_as_by_the_adapter(tmp_path: Path) -> None:
    """The product of the factors, scaled as llama.cpp does it, is the adapter's, but for the order of rows of q and k."""
    model = adapted(small_llama(), tmp_path, target_modules=[*LINEAR, "embed_tokens"], **SCALES)
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
    model = adapted(small_llama(), tmp_path, target_modules=["v_proj"], r=4, lora_alpha=6)
    told = splice.translate_files(
        tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base" / "config.json"
    )
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(told.place).tensors}
    own = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    assert np.array_equal(tensors["blk.1.attn_v.weight.lora_b"], own.lora_B["default"].weight.detach().numpy())
    assert np.array_equal(tensors["blk.1.attn_v.weight.lora_a"], own.lora_A["default"].weight.detach().numpy())


# -- llama.cpp itself


def _llama_base(network: Any, path: Path) -> None:
    """The base as llama.cpp has it, with tokens that mean nothing."""
    config = network.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(16)
    orders = {"q_proj.weight": 4, "k_proj.weight": 2}

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        heads = next((heads for end, heads in orders.items() if name.endswith(end)), None)
        if heads is None:
            return tensor
        return tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)

    _finish(writer, network, gguf.MODEL_ARCH.LLAMA, changed)


def _gpt2_base(network: Any, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_feed_forward_length(256)
    writer.add_layer_norm_eps(network.config.layer_norm_epsilon)
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    _finish(writer, network, gguf.MODEL_ARCH.GPT2, lambda name, tensor: tensor.T if name.endswith(turned) else tensor)


def _finish(writer: Any, network: Any, arch: Any, changed: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    writer.add_type("model")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(f"t{i}" for i in range(41))]
    )
    writer.add_token_scores([0.0] * 300)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 41)
    names = gguf.get_tensor_name_map(arch, 2)
    for name, tensor in network.state_dict().items():
        if name == "lm_head.weight" and network.config.tie_word_embeddings:
            continue
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(there, changed(name, tensor).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_PROGRAM = """
import json, sys
import xllamacpp
base, adapter, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = base, 64, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.cpuparams.n_threads = 1
if adapter:
    info = xllamacpp.CommonAdapterLoraInfo()
    info.path, info.scale = adapter, 1.0
    params.lora_adapters = [info]
asked = {"prompt": tokens, "n_predict": 1, "logprobs": 300, "temperature": 0.0}
answer = xllamacpp.Server(params).handle_completions(asked)
found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print("ANSWER" + json.dumps({each["id"]: each["logprob"] for each in found}))
"""


def in_llama_cpp(base: Path, adapter: Path | str) -> torch.Tensor:
    """The logarithms of the probabilities of the token after `TOKENS`."""
    command = [sys.executable, "-c", _PROGRAM, str(base), str(adapter), json.dumps(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert "ANSWER" in done.stdout, done.stderr[-2000:]
    found = json.loads(done.stdout.partition("ANSWER")[2])
    return torch.tensor([found[str(token)] for token in range(300)])


TOKENS = [5, 40, 77, 120, 33, 260, 299, 8]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_llama_cpp_computes_the_same(family: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    network = small_llama() if family == "llama" else small_gpt2()
    (_llama_base if family == "llama" else _gpt2_base)(network, tmp_path / "base.gguf")
    with torch.no_grad():
        base = network(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)
    targets = [*LINEAR, "embed_tokens", "lm_head"] if family == "llama" else ["c_attn", "c_proj", "c_fc"]
    model = adapted(network, tmp_path, target_modules=targets, **SCALES)
    with torch.no_grad():
        exact = model(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)
    file = splice.translate_files(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base").place
    assert torch.allclose(in_llama_cpp(tmp_path / "base.gguf", ""), base, atol=0.02)
    assert torch.allclose(in_llama_cpp(tmp_path / "base.gguf", file), exact, atol=0.02)
    assert (base - exact).abs().max() > 1


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
        ({"target_parameters": ["v_proj.weight"]}, "no place for target_parameters"),
    ],
)
def test_what_is_more_than_two_factors(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    adapted(small_llama(), tmp_path, target_modules=["q_proj"], **options)
    with pytest.raises(UnsupportedFeatureError, match=said):
        splice.translate_files(tmp_path / "adapter", tmp_path / "out", "gguf", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_it_refuses_what_verify_refuses() -> None:
    limits = engines()["llama.cpp"]["LORA"]
    assert limits.refused.keys() == REFUSED.keys() - {"alora_invocation_tokens"}


def test_scales_that_the_engine_s_own_program_does_not_know(tmp_path: Path) -> None:
    folder = parts(use_rslora=True, alpha_pattern={"v_proj": 3}).write(tmp_path)
    answer = asked("llama.cpp", look_into(open_adapter(str(folder))))
    assert answer.reasons == () and len(answer.notes) == 2
    assert "use_rslora: convert it with `splice convert --to gguf`" in answer.notes[0]


def test_output_layers_that_are_the_embeddings(tmp_path: Path) -> None:
    network = small_llama()
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
    adapted(small_llama(), tmp_path, target_modules=["q_proj"])
    bases.LLAMA.build().save_pretrained(tmp_path / "other")
    with pytest.raises(splice.AdapterMismatchError):
        splice.translate_files(tmp_path / "adapter", tmp_path / "out", "gguf", base=tmp_path / "other")


def test_the_program(tmp_path: Path) -> None:
    ran = run("convert", EXAMPLE, "--to", "gguf", "--base", BASE, "--out", tmp_path / "reverse.gguf")
    assert ran.code == 0 and ran.out == f"{tmp_path}/reverse.gguf: gguf, was peft\n  28 layers, 56 tensors\n", ran.err
