"""LoRA as llama.cpp reads it: GGUF, with the names and the order of rows that its own conversion gives to the base.

What the base's conversion does to each weight follows `convert_hf_to_gguf.py` of ggml-org/llama.cpp, and what is done for an
adapter `convert_lora_to_gguf.py`. The factor of a layer is `adapter.lora.alpha` divided by the rank of its own tensors, for
all layers: what differs from it is multiplied into B.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from splice.checkpoint.dialects import Dialect, Part
from splice.checkpoint.files import flush
from splice.errors import PeftError, UnsupportedFeatureError
from splice.methods.lora.written.factors import DOWN, EMBEDDING_DOWN, EMBEDDING_UP, UP, Factors, factors_of, left_out
from splice.methods.lora.written.stacked_experts import Stacked, as_matrix, is_stacked, stacked_in


class _Architecture(NamedTuple):
    """How llama.cpp knows a class of transformers."""

    # Its name there.
    name: str
    # Whether rows of queries and keys are paired for the rotary embedding as they were before transformers.
    rotates_pairs: bool = False


# Those whose weights are copied under another name, but for queries and keys; others are cut, joined or put in another order.
_ARCHITECTURES: Mapping[str, _Architecture] = {
    "LlamaForCausalLM": _Architecture("llama", rotates_pairs=True),
    "MistralForCausalLM": _Architecture("llama", rotates_pairs=True),
    "MixtralForCausalLM": _Architecture("llama", rotates_pairs=True),
    "GraniteForCausalLM": _Architecture("granite", rotates_pairs=True),
    "SmolLM3ForCausalLM": _Architecture("smollm3", rotates_pairs=True),
    "OlmoForCausalLM": _Architecture("olmo", rotates_pairs=True),
    "Olmo2ForCausalLM": _Architecture("olmo2"),
    "Qwen2ForCausalLM": _Architecture("qwen2"),
    "Qwen2MoeForCausalLM": _Architecture("qwen2moe"),
    "Qwen3ForCausalLM": _Architecture("qwen3"),
    "Qwen3MoeForCausalLM": _Architecture("qwen3moe"),
    "GemmaForCausalLM": _Architecture("gemma"),
    "Gemma2ForCausalLM": _Architecture("gemma2"),
    "Gemma3ForCausalLM": _Architecture("gemma3"),
    "Gemma3ForConditionalGeneration": _Architecture("gemma3"),
    "PhiForCausalLM": _Architecture("phi2"),
    "Phi3ForCausalLM": _Architecture("phi3"),
    "StableLmForCausalLM": _Architecture("stablelm"),
    "Starcoder2ForCausalLM": _Architecture("starcoder2"),
    "CohereForCausalLM": _Architecture("command-r"),
    "Cohere2ForCausalLM": _Architecture("cohere2"),
    "GPT2LMHeadModel": _Architecture("gpt2"),
}
# Of models for pictures too, what stands before the paths of the part for text, and what that is for itself.
_FRONTS = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""))
_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"


# What configs call the number of experts of a block.
_COUNTS = ("num_local_experts", "num_experts")


class _Tensor(NamedTuple):
    """A layer as the file has it."""

    # Of the base's tensor.
    name: str
    # Its factors.
    factors: Factors
    # The order of B's rows; None where they stay.
    order: torch.Tensor | None

    @property
    def is_embedding(self) -> bool:
        """Whether rows of A are looked up, and not multiplied with."""
        return self.name == _EMBEDDINGS


def _write(parts: Sequence[Part], base: Mapping[str, object], path: Path) -> Sequence[str]:
    if find_spec("gguf") is None:
        raise PeftError("files of llama.cpp are written by the package `gguf`: pip install 'splice[gguf]'")
    gguf: Any = import_module("gguf")
    (part,) = parts
    config = {**cast("Mapping[str, object]", base.get("text_config") or base)}
    config["tie_word_embeddings"] = bool(config.get("tie_word_embeddings") or base.get("tie_word_embeddings"))
    architecture = _architecture(base, config)
    layers = factors_of(
        part,
        "a GGUF file",
        (DOWN, UP, EMBEDDING_DOWN, EMBEDDING_UP),
        also=("alora_invocation_tokens", "target_parameters"),
    )
    name_of = _names(gguf, architecture, config)
    tensors = [
        _tensor(layer, as_matrix(layer, factors, part.fields), name_of, architecture, config)
        for layer, factors in layers.items()
        if not is_stacked(layer)
    ]
    experts = next((config[name] for name in _COUNTS if isinstance(config.get(name), int)), None)
    for stacked in stacked_in(layers, part.fields, cast("int | None", experts)):
        tensors.append(_Tensor(_expert_name(stacked), stacked.factors, None))
    twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
    if twice:
        raise PeftError(f"several layers of the adapter are {twice[0]!r} in llama.cpp")
    alpha = _common_alpha(tensors)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    tokens = part.fields.get("alora_invocation_tokens")
    if tokens:
        kinds = gguf.GGUFValueType
        writer.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, tokens, kinds.ARRAY, kinds.UINT32)
    _put(writer, tensors, alpha)
    flush(path)
    return left_out(part)


def _put(writer: Any, tensors: Sequence[_Tensor], alpha: float) -> None:
    """Names and shapes first, then the values, one layer at a time."""
    numpy: Any = import_module("numpy")
    for tensor in tensors:
        down, up = tensor.factors.down, tensor.factors.up
        shapes = (down.shape[::-1] if tensor.is_embedding else down.shape, up.shape)
        for letter, shape in zip("ab", shapes, strict=True):
            count = int(numpy.prod(shape, dtype=int))
            writer.add_tensor_info(f"{tensor.name}.lora_{letter}", shape, numpy.dtype(numpy.float32), 4 * count)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            for values in _values(tensor, alpha):
                writer.write_tensor_data(values.contiguous().numpy())
    finally:
        writer.close()


def _values(tensor: _Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in float32, which holds every value of an adapter; B with the part of the scale that is its own."""
    down, up = tensor.factors.down.read().float(), tensor.factors.up.read()
    own = tensor.factors.scale.alpha / alpha
    up = up.float() if own == 1 else (up.double() * own).float()
    return down.T if tensor.is_embedding else down, up if tensor.order is None else up[tensor.order]


def _architecture(base: Mapping[str, object], config: Mapping[str, object]) -> _Architecture:
    named = list(dict.fromkeys((*_list(config.get("architectures")), *_list(base.get("architectures")))))
    found = next((_ARCHITECTURES[name] for name in named if name in _ARCHITECTURES), None)
    if found is None:
        known = ", ".join(_ARCHITECTURES)
        raise UnsupportedFeatureError(
            f"how llama.cpp converts the weights of {' or '.join(named) or 'a base without `architectures`'} is not known "
            f"here, and an adapter has to follow it: known are {known}. Merge the adapter (`splice merge`), and convert the "
            "merged model"
        )
    return found


def _list(value: object) -> list[str]:
    return [str(each) for each in value] if isinstance(value, (list, tuple)) else []


def _number(config: Mapping[str, object], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int):
            return value
    raise PeftError(f"the base's config gives no {names[0]}")


def _names(gguf: Any, architecture: _Architecture, config: Mapping[str, object]) -> Callable[[str], str]:
    """The path of a layer -> the name of its weight in llama.cpp."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = _number(config, "num_hidden_layers", "n_layer", "n_layers")
    table = gguf.get_tensor_name_map(numbers[architecture.name], blocks)

    def name_of(path: str) -> str:
        had = next((pair for pair in _FRONTS if path.startswith(pair[0])), ("", ""))
        name: str | None = table.get_name(f"{had[1]}{path[len(had[0]) :]}.weight", try_suffixes=(".weight",))
        if name is None:
            raise UnsupportedFeatureError(
                f"llama.cpp has no tensor for {path!r} in its architecture {architecture.name!r}: merge the adapter "
                "(`splice merge`), and convert the merged model"
            )
        return name

    return name_of


def _tensor(
    path: str,
    factors: Factors,
    name_of: Callable[[str], str],
    architecture: _Architecture,
    config: Mapping[str, object],
) -> _Tensor:
    name = name_of(path)
    if len(factors.down.shape) != 2 or len(factors.up.shape) != 2:
        raise UnsupportedFeatureError(f"{path!r} is no linear layer: {factors.down.shape}; llama.cpp adapts no others")
    if (EMBEDDING_DOWN in factors.tensors) != (name == _EMBEDDINGS):
        raise UnsupportedFeatureError(f"{path!r} is {name!r} in llama.cpp, which looks up embeddings there alone")
    if name in (_EMBEDDINGS, _OUTPUT) and config.get("tie_word_embeddings"):
        raise UnsupportedFeatureError(
            f"{path!r}: the base's embeddings are its output layer too, which llama.cpp cannot tell apart; merge the adapter "
            "(`splice merge`), and convert the merged model"
        )
    order = None
    last = path.rpartition(".")[2]
    if architecture.rotates_pairs and last in ("q_proj", "k_proj"):
        heads = _number(config, "num_attention_heads")
        if last == "k_proj" and config.get("num_key_value_heads") is not None:
            heads = _number(config, "num_key_value_heads")
        order = pairs_together(factors.up.shape[0], heads, path)
    return _Tensor(name, factors, order)


def pairs_together(rows: int, heads: int, place: str) -> torch.Tensor:
    """The order of rows in which the two numbers that a rotary embedding turns are neighbours: (rows,) of indices.

    transformers keeps the first numbers of all pairs of a head in its first half, and the second ones in its second half.

    Raises:
        PeftError: the rows are not those of so many heads.
    """
    if rows % (2 * heads):
        raise PeftError(f"{place}: {rows} rows are not those of {heads} heads: the base is another one")
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(rows)


def _expert_name(stacked: Stacked) -> str:
    found = re.search(r"\.layers\.(\d+)\.", stacked.path)
    if found is None:
        raise UnsupportedFeatureError(f"{stacked.path!r} is in no numbered layer: llama.cpp has no tensor for it")
    return f"blk.{found[1]}.ffn_{stacked.role}_exps.weight"


def _common_alpha(tensors: Sequence[_Tensor]) -> float:
    # Not zero, which llama.cpp takes for "no scale".
    alphas = Counter(tensor.factors.scale.alpha for tensor in tensors if tensor.factors.scale.alpha)
    return float(alphas.most_common(1)[0][0]) if alphas else 1.0


GGUF = Dialect("gguf", "LORA", "adapter.gguf", None, None, _write, needs_base=True)
