"""Which modules a method targets when the config names none, by the base model's `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_GROUPS: tuple[tuple[str, list[str] | str], ...] = (
    ("t5 mt5", ["q", "v"]),
    (
        "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
        ["q_proj", "v_proj"],
    ),
    ("gpt2 gpt_bigcode", ["c_attn"]),
    ("bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon", ["query_key_value"]),
    ("blip-2", ["q", "v", "q_proj", "v_proj"]),
    ("bert roberta xlm-roberta electra layoutlm", ["query", "value"]),
    ("deberta-v2", ["query_proj", "value_proj"]),
    ("deberta", ["in_proj"]),
    ("mpt", ["Wqkv"]),
    ("btlm", ["c_proj", "c_attn"]),
    ("codegen", ["qkv_proj"]),
    ("phi", ["q_proj", "v_proj", "fc1", "fc2"]),
    ("gemma4", r".*language_model\..*\.(q_proj|v_proj)"),
    ("nemotron_h", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ("rwkv", ["key", "value", "receptance", "output"]),
    ("rwkv7", ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"]),
)

LORA_TARGETS: Mapping[str, list[str] | str] = MappingProxyType(
    {model_type: targets for names, targets in _GROUPS for model_type in names.split()}
)

_VALUES: tuple[tuple[str, list[str]], ...] = (
    ("t5 mt5", ["v"]),
    (
        "bart opt gptj gpt_neo llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi",
        ["v_proj"],
    ),
    ("bert roberta", ["value"]),
    ("deberta-v2", ["value_proj"]),
)

# The projections to values.
BEFT_TARGETS: Mapping[str, list[str]] = MappingProxyType(
    {model_type: targets for names, targets in _VALUES for model_type in names.split()}
)

# Beside its targets, those of them whose input (IA)³ scales: each group ends with these.
_IA3_GROUPS: tuple[tuple[str, list[str], list[str]], ...] = (
    ("t5", ["k", "v"], ["wo"]),
    ("mt5", ["k", "v", "wi_1"], []),
    ("gpt2 gpt_bigcode", ["c_attn"], ["mlp.c_proj"]),
    ("bloom", ["query_key_value"], ["mlp.dense_4h_to_h"]),
    ("bert roberta", ["key", "value"], ["output.dense"]),
    ("opt", ["q_proj", "k_proj"], ["fc2"]),
    ("gptj", ["q_proj", "v_proj"], ["fc_out"]),
    ("gpt_neox RefinedWebModel RefinedWeb falcon", ["query_key_value"], ["dense_4h_to_h"]),
    ("gpt_neo", ["q_proj", "v_proj"], ["c_proj"]),
    ("bart phi", ["q_proj", "v_proj"], ["fc2"]),
    ("llama mistral", ["k_proj", "v_proj"], ["down_proj"]),
    ("llama4 gemma gemma2 gemma3_text qwen2 qwen3", ["q_proj", "v_proj"], ["down_proj"]),
    ("mixtral", ["k_proj", "v_proj"], ["w2"]),
    ("deberta-v2", ["key_proj", "value_proj"], ["output.dense"]),
    ("deberta", ["in_proj"], ["output.dense"]),
)

IA3_FEEDFORWARD: Mapping[str, list[str]] = MappingProxyType(
    {model_type: inputs for names, _, inputs in _IA3_GROUPS for model_type in names.split()}
)
IA3_TARGETS: Mapping[str, list[str]] = MappingProxyType(
    {model_type: outputs + inputs for names, outputs, inputs in _IA3_GROUPS for model_type in names.split()}
)

_NORMS: tuple[tuple[str, list[str]], ...] = (
    ("llama mistral gemma", ["input_layernorm", "post_attention_layernorm", "norm"]),
    ("bloom falcon", ["input_layernorm", "post_attention_layernorm", "ln_f"]),
    (
        "llava",
        ["multi_modal_projector", "input_layernorm", "post_attention_layernorm", "norm", "embed_tokens", "lm_head"],
    ),
    ("t5 mt5", ["layer_norm", "final_layer_norm"]),
    ("bart", ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"]),
    ("gpt2", ["ln_1", "ln_2", "ln_f"]),
    ("blip-2", ["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"]),
    ("gptj", ["ln_1", "ln_f"]),
    ("phi", ["input_layernorm", "final_layernorm"]),
    (
        "gemma2 gemma3_text",
        [
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "norm",
        ],
    ),
    ("qwen2 qwen3", ["post_attention_layernorm"]),
)

LN_TUNING_TARGETS: Mapping[str, list[str]] = MappingProxyType(
    {model_type: targets for model_types, targets in _NORMS for model_type in model_types.split()}
)

# Those of LoRA, with more of each block on some models.
_ADALORA_GROUPS: tuple[tuple[str, list[str]], ...] = (
    ("t5", ["q", "k", "v", "o", "wi", "wo"]),
    ("mt5", ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]),
    ("bart opt", ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    ("roberta", ["query", "key", "value", "dense"]),
    ("deberta-v2", ["query_proj", "key_proj", "value_proj", "dense"]),
)
_AS_LORA = (
    *("gpt2", "bloom", "gptj", "gpt_neox", "gpt_neo", "llama", "llama4", "bert", "gpt_bigcode", "deberta", "gemma"),
    *("gemma2", "gemma3_text", "gemma4", "qwen2", "qwen3", "nemotron_h"),
)
ADALORA_TARGETS: Mapping[str, list[str] | str] = MappingProxyType(
    {
        **{model_type: LORA_TARGETS[model_type] for model_type in _AS_LORA},
        **{model_type: targets for names, targets in _ADALORA_GROUPS for model_type in names.split()},
    }
)

# Whole blocks: what is trained is a part of the weights themselves.
_OSF_GROUPS: tuple[tuple[str, list[str]], ...] = (
    (
        "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"],
    ),
    ("gpt2 gpt_bigcode", ["c_attn", "c_proj"]),
    ("opt", ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    ("gptj", ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]),
    ("bloom falcon gpt_neox", ["query_key_value", "dense_4h_to_h"]),
)
OSF_TARGETS: Mapping[str, list[str]] = MappingProxyType(
    {model_type: targets for model_types, targets in _OSF_GROUPS for model_type in model_types.split()}
)
