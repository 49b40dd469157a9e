"""Keys and values of a real text as the start of a prefix: what a cartridge is trained from (arXiv 2506.06266, section 3.2).

Without training the first n tokens of a text, so put in front, give what the text itself would give.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from splice.base.bare import original_class
from splice.base.caches import cache_of, keys_and_values
from splice.base.dense import device_of
from splice.base.evaluating import evaluating
from splice.discovery import public
from splice.errors import warn
from splice.kinds.adapters import Adapters, adapters_on, layers_of
from splice.methods.prompts.cached import CachedPrompt
from splice.selection import NOTHING


class Tokenizer(Protocol):
    """A tokenizer of transformers, as far as it is asked."""

    def __call__(self, text: str, **options: object) -> Mapping[str, torch.Tensor]:
        """`input_ids`, (1, T), among others."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: object) -> torch.Tensor:
        """The ids of a conversation, (1, T)."""
        ...


@public
def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> torch.Tensor:
    """The first positions of a cache as the table that checkpoints of prefix tuning and cartridges hold.

    Args:
        past_key_values: what a network returned for one row: a cache of transformers, or (keys, values) for each layer, each
            (1, heads, T, size of a head).
        num_virtual_tokens: how many positions, n.

    Returns:
        (n, layers * 2 * heads * size of a head), in the dtype of the cache.

    Raises:
        TypeError: it is no cache.
        ValueError: it is empty, has several rows or fewer positions, or its layers differ.
    """
    layers = keys_and_values(past_key_values)
    _check_cache(layers, num_virtual_tokens)
    blocks = [part[0, :, :num_virtual_tokens].transpose(0, 1) for pair in layers for part in pair]
    # (n, 2 * layers, heads, size of a head), keys before values.
    return torch.stack([block.to(blocks[0].device) for block in blocks], dim=1).flatten(1)


@public
@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: nn.Module, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> torch.Tensor:
    """Let an adapter of prefix tuning or a cartridge start from the first positions of a cache.

    Args:
        model: a PeftModel.
        adapter_name: the adapter; None for the active one.
        past_key_values: as of `prompt_embeddings_from_past_key_values`.
        num_virtual_tokens: that of the adapter; None for it.

    Returns:
        The table that the adapter has now.

    Raises:
        KeyError: there is no such adapter.
        TypeError: `past_key_values` is no cache.
        ValueError: the adapter is one of another method, or its keys and values follow from other tensors; or the cache does
            not fit it. The adapter is unchanged.
    """
    layer = _layer(model, adapter_name)
    _check_count(layer, num_virtual_tokens)
    pairs = keys_and_values(past_key_values)
    table = prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=layer.count)
    own, found = (layer.layers, layer.heads), (len(pairs), pairs[0][0].shape[1])
    if own != found:
        raise ValueError(
            f"`past_key_values` has {found[0]} layers with {found[1]} heads, and the adapter is for {own[0]} layers with "
            f"{own[1]} heads: the cache is that of another network. The adapter is unchanged."
        )
    layer.take(table)
    return table


@public
@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> torch.Tensor:
    """Let an adapter of prefix tuning or a cartridge start from the keys and values of the first tokens of a text.

    Args:
        model: a PeftModel. It is run without adapters, in eval mode.
        tokenizer: the base model's.
        text: at least as long as the adapter has virtual tokens.
        adapter_name: the adapter; None for the active one.
        num_virtual_tokens: that of the adapter; None for it.
        use_chat_template: whether the text is a system message, where the tokenizer has a chat template that takes one.
        max_length: after how many tokens the text is cut; None for nowhere.

    Returns:
        The table that the adapter has now.

    Raises:
        KeyError: there is no such adapter.
        ValueError: as `initialize_kv_prefix_from_past_key_values`, or the text is too short.
    """
    layer = _layer(model, adapter_name)
    _check_count(layer, num_virtual_tokens)
    ids = _ids_of(tokenizer, text, use_chat_template, max_length)
    if ids.shape[1] < layer.count:
        raise ValueError(
            f"Need at least {layer.count} cached tokens, got {ids.shape[1]}: the text has fewer tokens than the adapter "
            "(`num_virtual_tokens`)"
        )
    # No further: what stands later changes nothing before it.
    cache = _prefilled(_adapters(model), layer, ids[:, : layer.count])
    return initialize_kv_prefix_from_past_key_values(model, adapter_name=adapter_name, past_key_values=cache)


def _prefilled(adapters: Adapters, layer: CachedPrompt, ids: torch.Tensor) -> object:
    """The cache that the bare network has of these tokens."""
    # Here, as where a cache is filled: whoever has such a network has imported transformers.
    from transformers import DynamicCache

    network = layer.base
    # Not one that the network makes for itself, whose layers with a sliding window would forget the first tokens.
    given = {"input_ids": ids.to(device_of(network)), "use_cache": True, layer.cache_name: DynamicCache()}
    # Dropout would be in every key and value from then on.
    with evaluating(network), adapters.selection.for_this_call(NOTHING):
        cache = cache_of(network(**given))
    if cache is None:
        raise ValueError(
            f"{original_class(network).__name__} returns no cache; give `past_key_values` instead of a text"
        )
    return cache


def _ids_of(tokenizer: Tokenizer, text: str, use_chat_template: bool, max_length: int | None) -> torch.Tensor:
    """(1, T): the tokens of a text."""
    if use_chat_template:
        message = [{"role": "system", "content": text}]
        options = {"tokenize": True, "add_generation_prompt": False, "return_dict": False, "return_tensors": "pt"}
        try:
            return tokenizer.apply_chat_template(message, **options)[:, :max_length]
        except (AttributeError, ValueError):
            pass  # a tokenizer without a template, which is nothing to speak of
        except Exception as error:  # templates refuse messages by exceptions of any kind
            warn(f"the tokenizer's chat template takes no system message ({error}); the text is taken without.")
    cut: dict[str, object] = {"truncation": max_length is not None, "max_length": max_length}
    return tokenizer(text, return_tensors="pt", **cut)["input_ids"]


def _adapters(model: nn.Module) -> Adapters:
    adapters = adapters_on(model)
    if adapters is None:
        raise ValueError(
            f"the model must be a PeftModel with an adapter of prefix tuning or a cartridge, got a "
            f"{type(model).__name__} without adapters"
        )
    return adapters


def _layer(model: nn.Module, adapter_name: str | None) -> CachedPrompt:
    """The layer with the keys and values of this adapter, of the active one if None."""
    adapters = _adapters(model)
    name = next(iter(adapters.selection.active), None) if adapter_name is None else adapter_name
    if name is None or name not in adapters.peft_config:
        raise KeyError(f"no adapter {name!r}; there are {list(adapters.peft_config)}")
    layer = next(iter(layers_of(adapters, [name], CachedPrompt).values()), None)
    if layer is None:
        raise ValueError(
            f"Adapter {name!r} must be a CARTRIDGE or PREFIX_TUNING adapter (got {adapters.peft_config[name].peft_type})."
        )
    layer.check_fillable()
    return layer


def _check_count(layer: CachedPrompt, given: int | None) -> None:
    if given is not None and given != layer.count:
        raise ValueError(
            f"`num_virtual_tokens` is {given}, and the adapter has {layer.count}: leave it out. The adapter is unchanged."
        )


def _check_cache(layers: list[tuple[torch.Tensor, torch.Tensor]], count: int) -> None:
    """Raise ValueError for a cache whose first `count` positions are no prefix."""
    if count < 1:
        raise ValueError(f"`num_virtual_tokens` should be a positive integer, got {count}")
    if not layers:
        raise ValueError("Empty `past_key_values`.")
    first = layers[0][0]
    for index, part in ((index, part) for index, pair in enumerate(layers) for part in pair):
        if part.dim() != 4:
            raise ValueError(f"Expected key/value tensors with rank 4, got key.ndim={part.dim()} in layer {index}.")
        batch, heads, length, dim = part.shape
        if batch != 1:
            raise ValueError(
                f"This helper expects `past_key_values` from a single-sequence prefill (batch=1). Got batch={batch}."
            )
        if length < count:
            raise ValueError(f"Need at least {count} cached tokens, got {length} in layer {index}.")
        if (heads, dim) != (first.shape[1], first.shape[3]):
            raise ValueError(
                f"Inconsistent head shapes across layers in `past_key_values`: {first.shape[1]} heads of size "
                f"{first.shape[3]} in layer 0, {heads} of {dim} in layer {index}."
            )
