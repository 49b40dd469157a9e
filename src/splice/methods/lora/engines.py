"""What programs that serve models take of LoRA adapters: their limits as data, each with where it is documented.

It is read without the method, since `splice verify --engine` asks before anything else is imported.
"""

from __future__ import annotations

from types import MappingProxyType

from splice.checkpoint.engines import Limits, register_limits
from splice.checkpoint.types import PeftType

_LINEAR, _EMBEDDING = {"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"}
# Variants that are more or something else than a product of A and B; no engine reads the field, and each would be wrong.
OTHER_PRODUCTS = {
    "use_bdlora": "A or B is block-diagonal",
    "use_qalora": "A is for averaged inputs",
    "kasa_config": "the product has a diagonal in the middle",
    "target_parameters": "the factors are of stacked experts",
    "layer_replication": "layers of the base are called more than once",
    "trainable_token_indices": "rows of embeddings are trained beside it",
}

_CONVERT = (
    "convert it with `splice convert --to gguf`; llama.cpp's own script knows no field of the config but lora_alpha"
)

# vLLM, as documented for 0.14 to 0.22:
# - ranks: docs.vllm.ai/en/v0.14.0/api/vllm/config/lora/ (`MaxLoRARanks`; 16 without the option)
# - fields: docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/ (DoRA and saved modules are refused, `bias` can be "none" alone,
#   and one factor, alpha / r or alpha / sqrt(r) of the config, is for all layers); its pull request 25807 took biases out
# - tensors: its parser of names knows A, B and the two of embeddings; of any other it says "unsupported LoRA weight"
register_limits(
    "vllm",
    PeftType.LORA,
    Limits(
        suffixes=frozenset(_LINEAR | _EMBEDDING),
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        rank_option="--max-lora-rank {rank}",
        default_rank=16,
        refused=MappingProxyType(
            {
                "use_dora": "it does not support DoRA",
                "bias": "it supports no trained biases",
                "lora_bias": "it supports no trained biases",
                "rank_pattern": "it scales every layer by the config's own rank",
                "alpha_pattern": "it scales every layer by the config's own alpha",
                "alora_invocation_tokens": "the adapter would be on from the first token",
                **OTHER_PRODUCTS,
            }
        ),
    ),
)

# SGLang, as documented in docs.sglang.io/advanced_features/lora.html:
# - ranks: `--max-lora-rank` takes any, and without it is the largest of the adapters at the start
# - modules: those that `--lora-target-modules` lists
# - scale: python/sglang/srt/lora/lora.py of sgl-project/sglang, where it is `lora_alpha / r` of the config for all layers
# - tensors: the same file, which knows A and B
register_limits(
    "sglang",
    PeftType.LORA,
    Limits(
        suffixes=frozenset(_LINEAR | _EMBEDDING),
        refused=MappingProxyType(
            {
                "use_dora": "it does not support DoRA",
                "use_rslora": "it scales by lora_alpha / r",
                "bias": "it supports no trained biases",
                "lora_bias": "it supports no trained biases",
                "rank_pattern": "it scales every layer by the config's own rank",
                "alpha_pattern": "it scales every layer by the config's own alpha",
                "alora_invocation_tokens": "the adapter would be on from the first token",
                **OTHER_PRODUCTS,
            }
        ),
        modules=frozenset(
            {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}
            | {"embed_tokens", "lm_head"}
        ),
    ),
)

# llama.cpp, as its `convert_lora_to_gguf.py` (ggml-org/llama.cpp) does it:
# - tensors: A, B and the two of embeddings; any other ends the conversion with "Not a lora_A or lora_B tensor"
# - scale: `lora_alpha` of the config, divided by the rank of each tensor; no other field is read but aLoRA's tokens. `splice
#   convert --to gguf` (written/llama_cpp.py) multiplies what differs into the tensors, and refuses what is refused here
register_limits(
    "llama.cpp",
    PeftType.LORA,
    Limits(
        suffixes=frozenset(_LINEAR | _EMBEDDING),
        refused=MappingProxyType(
            {
                "use_dora": "it does not support DoRA",
                "bias": "it supports no trained biases",
                "lora_bias": "it supports no trained biases",
                **{name: why for name, why in OTHER_PRODUCTS.items() if name != "target_parameters"},
            }
        ),
        noted=MappingProxyType({"use_rslora": _CONVERT, "alpha_pattern": _CONVERT, "target_parameters": _CONVERT}),
    ),
)
