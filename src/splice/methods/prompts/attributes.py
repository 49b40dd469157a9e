"""What people's scripts read on a model with virtual tokens, by the reference's names, worked out from its adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from splice.base.foreign_models import input_embedding_layer
from splice.config import PromptLearningConfig
from splice.kinds.adapters import Adapters, layers_of
from splice.methods.prompts.cache import Cache
from splice.methods.prompts.cached import CachedPrompt
from splice.methods.prompts.prompt import PromptLayer


def prompt_layer(adapters: Adapters, adapter_name: str) -> PromptLayer:
    """The layer with the virtual tokens of this adapter.

    Raises:
        ValueError: there is no such adapter.
    """
    found = layers_of(adapters, [adapter_name], PromptLayer)
    if not found:
        raise ValueError(f"Adapter {adapter_name!r} not found; there are {list(adapters.peft_config)}.")
    return next(iter(found.values()))


def prompt_tokens(adapters: Adapters) -> dict[str, torch.Tensor]:
    """Adapter name -> indices of its virtual tokens, for every submodule one after the other."""
    tokens = {}
    for name, config in adapters.peft_config.items():
        assert isinstance(config, PromptLearningConfig) and config.num_virtual_tokens is not None
        tokens[name] = torch.arange(config.num_virtual_tokens * (config.num_transformer_submodules or 1))
    return tokens


def word_embeddings(adapters: Adapters) -> nn.Module | None:
    """The base's layer that embeds tokens."""
    return input_embedding_layer(adapters.model)


def get_prompt_embedding_to_save(adapters: Adapters, adapter_name: str) -> torch.Tensor:
    """The table that a checkpoint of this adapter holds, on the CPU."""
    return prompt_layer(adapters, adapter_name).table_to_save().cpu()


def get_prompt(
    adapters: Adapters, batch_size: int, task_ids: torch.Tensor | None = None, max_cache_len: int | None = None
) -> torch.Tensor | Cache:
    """What the active adapter puts in front of `batch_size` rows: a tensor (batch, tokens, dim), or a cache.

    Raises:
        ValueError: `max_cache_len` is given: a cache of a fixed length cannot be filled beforehand.
    """
    if max_cache_len is not None:
        raise ValueError("`max_cache_len`: a cache of a fixed length cannot hold virtual tokens; leave it out")
    layer = prompt_layer(adapters, adapters.selection.active[0])
    if isinstance(layer, CachedPrompt):
        values = layer.virtual_tokens({})
        return layer.filled(None, values.expand(batch_size, *values.shape[1:]))
    tokens = layer.every_token(task_ids)
    return tokens.expand(batch_size, *tokens.shape[1:])


# What every record of such a method has as `tuner_methods` and `tuner_views`.
PROMPT_METHODS: Mapping[str, Callable[..., object]] = MappingProxyType(
    {"get_prompt": get_prompt, "get_prompt_embedding_to_save": get_prompt_embedding_to_save}
)
PROMPT_VIEWS: Mapping[str, Callable[[Adapters], object]] = MappingProxyType(
    {"prompt_tokens": prompt_tokens, "word_embeddings": word_embeddings}
)
