"""The sizes that a prompt-learning config leaves open, read from the base model's own config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from splice.base.foreign_models import field_of, text_config
from splice.checkpoint.types import TaskType
from splice.config import PromptLearningConfig

# Where the configs of transformers keep each size.
_SIZES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


def _fields_of(network: nn.Module) -> Mapping[str, Any]:
    """What the base model's config says about text; nothing, where it has no config."""
    config: Any = text_config(network)
    if config is None or isinstance(config, dict):
        return config or {}
    # Not by its attributes: a config of transformers answers to names that it maps to its own, and some work a size out that
    # the model does not have.
    fields: Mapping[str, Any] = config.to_dict()
    return fields


def sizes_of(network: nn.Module, config: PromptLearningConfig) -> dict[str, int]:
    """The sizes of `config`, with what it leaves open filled in.

    Raises:
        ValueError: the base model's config does not say one of them.
    """
    submodules = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    found = {"num_transformer_submodules": config.num_transformer_submodules or submodules}
    said = {field: getattr(config, field) for field in _SIZES}
    # Checkpoints say all of them, and the fields of a config of transformers are copied each time.
    base = {} if all(said.values()) else _fields_of(network)
    for field, names in _SIZES.items():
        value = said[field] or next((base[name] for name in names if base.get(name) is not None), None)
        if value is None:
            raise ValueError(f"Please specify `{field}` in `peft_config`: the base model's config has none of {names}")
        found[field] = value
    return found


def cache_sizes_of(network: nn.Module, config: PromptLearningConfig) -> dict[str, int]:
    """As `sizes_of`, for methods whose virtual tokens are keys and values.

    Where heads share keys and values, a token is as wide as those, whatever the config says. Of layers that differ, the
    largest counts.

    Raises:
        ValueError: as `sizes_of`.
    """
    sizes = sizes_of(network, config)
    base = _fields_of(network)
    heads = base.get("num_key_value_heads")
    if heads is None:
        return sizes
    if base.get("global_head_dim"):
        heads, dim = base.get("num_global_key_value_heads") or heads, base["global_head_dim"]
    else:
        dims = [layer.get("head_dim") or 0 for layer in _layers(base)]
        dim = max([*dims, base.get("head_dim") or 0]) or sizes["token_dim"] // sizes["num_attention_heads"]
    return {**sizes, "num_attention_heads": heads, "token_dim": dim * heads}


def _layers(fields: Mapping[str, Any]) -> list[Mapping[str, int | None]]:
    """The fields of each layer, of models whose layers differ."""
    given = fields.get("per_layer_config") or ()
    return list(given.values() if isinstance(given, dict) else given)


def rooms_of(network: nn.Module, layers: int, heads: int, dim: int) -> dict[int, tuple[int, int]]:
    """Layer -> (heads, size of a head) that its cache takes of keys with `heads` and `dim`, for every layer that takes any.

    Layers that need more than that, or that read the keys of another layer, are left out.
    """
    config: Any = text_config(network)
    # A list with an entry for each layer, of models in which some read the keys of others.
    sharing: Any = field_of(config, "kv_sharing_modes")
    rooms = {layer: (heads, dim) for layer in range(layers) if not sharing or sharing[layer] != "reuse"}
    fields = _fields_of(network)
    if not fields.get("per_layer_config") and not fields.get("global_head_dim"):
        return rooms
    # By the attribute, which fills in what a layer does not say of itself.
    own = {layer: config.per_layer_config[layer] for layer in rooms}
    shapes = {layer: (one.num_key_value_heads, one.head_dim) for layer, one in own.items()}
    return {layer: shape for layer, shape in shapes.items() if shape[0] <= heads and shape[1] <= dim}
