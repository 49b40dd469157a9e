"""Small models of many families as llama.cpp has them, and what llama.cpp itself computes with an adapter on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splice.methods.lora.written.llama_cpp import _ARCHITECTURES, pairs_together
from tests.cli import ROOT

TOKENS = [5, 40, 77, 120, 33, 260, 299, 8]
# The heads are of 16 numbers, as the width says.
_SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# What llama.cpp takes as given, or what would not be told apart from its default.
_FIELDS: dict[str, dict[str, Any]] = {
    "GraniteForCausalLM": {
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
    },
    "Gemma2ForCausalLM": {"query_pre_attn_scalar": 16},
    "Gemma3ForCausalLM": {"query_pre_attn_scalar": 16},
    "MixtralForCausalLM": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "Qwen3MoeForCausalLM": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}


def small(family: str, **fields: Any) -> Any:
    """A model of this class of transformers, with weights that make the tokens differ in probability."""
    import transformers

    cls = getattr(transformers, family)
    if family == "GPT2LMHeadModel":
        config = cls.config_class(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    else:
        tied = family.startswith(("Gemma", "Cohere"))
        config = cls.config_class(**{**_SIZES, "tie_word_embeddings": tied, **_FIELDS.get(family, {}), **fields})
    torch.manual_seed(0)
    network = cls(config).eval()
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * 0.15
    return network


def write_base(network: nn.Module, path: Path) -> None:
    """The model in a file of llama.cpp, with tokens that mean nothing."""
    import gguf

    family, config = type(network).__name__, network.config
    architecture = _ARCHITECTURES[family]
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type("model")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", 4))
    writer.add_feed_forward_length(256 if family == "GPT2LMHeadModel" else 96)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    epsilons = [getattr(config, name, None) for name in ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon")]
    writer.add_layer_norm_eps(next(filter(None, epsilons), 1e-5))
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", 96))
    if family == "Qwen2MoeForCausalLM":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    _add_rotation(writer, config)
    _add_scales(writer, family, config)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(f"t{i}" for i in range(41))]
    )
    writer.add_token_scores([0.0] * 300)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 41)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture.name], 2)
    for name, tensor in network.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture.rotates_pairs and ("q_proj" in name or "k_proj" in name):
            heads = 4 if "q_proj" in name else config.num_key_value_heads
            tensor = tensor[pairs_together(len(tensor), heads, name)]
        if family.startswith("Gemma") and "norm" in name:
            tensor = tensor + 1
        if family == "GPT2LMHeadModel" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        if name.endswith(".experts.gate_up_proj"):
            front = f"blk.{name.split('.')[2]}.ffn_"
            for role, half in zip(("gate", "up"), tensor.chunk(2, dim=1)):
                writer.add_tensor(f"{front}{role}_exps.weight", half.contiguous().numpy())
            continue
        name += ".weight" if name.endswith(".experts.down_proj") else ""
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(there, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_rotation(writer: Any, config: Any) -> None:
    said = getattr(config, "rope_parameters", None) or {}
    if isinstance(next(iter(said.values()), None), dict):
        said = said["full_attention"]
    share = said.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(int(16 * share))
    writer.add_rope_freq_base(float(said.get("rope_theta", 10000.0)))
    writer.add_key_length(16)
    writer.add_value_length(16)


def _add_scales(writer: Any, family: str, config: Any) -> None:
    if family == "GraniteForCausalLM":
        writer.add_logit_scale(config.logits_scaling)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
    if family.startswith("Cohere"):
        writer.add_logit_scale(config.logit_scale)
    if family == "Gemma2ForCausalLM":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if family in ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Cohere2ForCausalLM"):
        writer.add_sliding_window(config.sliding_window)


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
# Some token that is text is taken, whatever is the most probable one: of bytes nothing is told.
asked = {"prompt": tokens, "n_predict": 1, "logprobs": 300, "temperature": 0.0, "logit_bias": [[270, 1000.0]]}
answer = xllamacpp.Server(params).handle_completions(asked)
found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print("ANSWER" + json.dumps({each["id"]: each["logprob"] for each in found}))
"""


def in_llama_cpp(base: Path, adapter: Path | None) -> torch.Tensor:
    """The logarithms of the probabilities of the token after `TOKENS`."""
    command = [sys.executable, "-c", _PROGRAM, str(base), str(adapter or ""), json.dumps(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert "ANSWER" in done.stdout, done.stderr[-2000:]
    found = json.loads(done.stdout.partition("ANSWER")[2])
    return torch.tensor([found[str(token)] for token in range(300)])
