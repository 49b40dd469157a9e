"""The sizes that a prompt-learning config leaves open, read from the base model's own config."""

from __future__ import annotations

from typing import Any

from splice.base.asking import asked
from splice.checkpoint.types import TaskType
from splice.config import PromptLearningConfig

# Where the configs of transformers keep each size.
_SIZES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


def text_config(network: Any) -> Any:
    """The config of a base model; of models that see or hear as well, the part of it that is about text."""
    # Only configs of models with several parts have it.
    return asked(network.config, "text_config") or network.config


def sizes_of(network: Any, config: PromptLearningConfig) -> dict[str, Any]:
    """The sizes of `config`, with what it leaves open filled in.

    Raises:
        ValueError: the base model's config does not say one of them.
    """
    base = text_config(network).to_dict()
    submodules = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    found = {"num_transformer_submodules": config.num_transformer_submodules or submodules}
    for field, names in _SIZES.items():
        value = vars(config)[field] or next((base[name] for name in names if base.get(name) is not None), None)
        if value is None:
            raise ValueError(f"Please specify `{field}` in `peft_config`: the base model's config has none of {names}")
        found[field] = value
    return found


def cache_sizes_of(network: Any, config: PromptLearningConfig) -> dict[str, Any]:
    """As `sizes_of`, for methods whose virtual tokens are keys and values.

    Where heads share keys and values, a token is as wide as those, whatever the config says. Of layers that differ, the
    largest counts.

    Raises:
        ValueError: as `sizes_of`.
    """
    sizes = sizes_of(network, config)
    base = text_config(network).to_dict()
    heads = base.get("num_key_value_heads")
    if heads is None:
        return sizes
    if base.get("global_head_dim"):
        heads, dim = base.get("num_global_key_value_heads") or heads, base["global_head_dim"]
    else:
        dims = [layer["head_dim"] for layer in _layers(base.get("per_layer_config")) if layer.get("head_dim")]
        dim = max([*dims, base.get("head_dim") or 0]) or sizes["token_dim"] // sizes["num_attention_heads"]
    return {**sizes, "num_attention_heads": heads, "token_dim": dim * heads}


def _layers(per_layer: Any) -> list[dict[str, Any]]:
    return list(per_layer.values() if isinstance(per_layer, dict) else per_layer or ())


def rooms_of(network: Any, layers: int, heads: int, dim: int) -> dict[int, tuple[int, int]]:
    """Layer -> (heads, size of a head) that its cache takes of keys with `heads` and `dim`, for every layer that takes any.

    Layers that need more than that, or that read the keys of another layer, are left out.
    """
    config = text_config(network)
    # Only configs of models whose layers share keys or differ in size have these.
    sharing = asked(config, "kv_sharing_modes") or [None] * layers
    rooms = {layer: (heads, dim) for layer in range(layers) if sharing[layer] != "reuse"}
    if not config.to_dict().get("per_layer_config") and not config.to_dict().get("global_head_dim"):
        return rooms
    own = {layer: config.per_layer_config[layer] for layer in rooms}
    shapes = {layer: (one.num_key_value_heads, one.head_dim) for layer, one in own.items()}
    return {layer: shape for layer, shape in shapes.items() if shape[0] <= heads and shape[1] <= dim}
