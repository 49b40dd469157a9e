"""Caches of keys and values, as networks are called with them: how much is in one, and which tokens.

A cache does not know its tokens. Who has to know them notes them on it; a deep copy of a cache carries its note along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

# Under which names networks take a cache: that of transformers, and its newer one.
NAMES = ("past_key_values", "cache")
# In the place of a token that nobody knows; no token of any vocabulary.
UNKNOWN = -1

_NOTE = "splice_tokens"


def cache_in(options: Mapping[str, object]) -> object | None:
    """The cache among the named arguments of a call, or None."""
    return next((options[name] for name in NAMES if options.get(name) is not None), None)


def length_of(cache: object | None) -> int:
    """The number of positions in a cache; 0 of none, and of what is no cache of transformers."""
    # Tuples of tensors, as before transformers 5, cannot be asked.
    measure = getattr(cache, "get_seq_length", None)
    return 0 if measure is None else int(measure())


def keys_and_values(cache: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The keys and the values of each layer in a cache, (batch, heads, tokens, size of a head), from the first token on.

    Args:
        cache: a cache of transformers (of an encoder-decoder: what its decoder has of its own tokens), or pairs of tensors.

    Raises:
        TypeError: it is something else.
        ValueError: a layer has dropped its first tokens, as those with a sliding window do, or stores them as codes.
    """
    # Here, since whoever has such a cache has imported transformers.
    from transformers import Cache, EncoderDecoderCache

    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if isinstance(own, Cache):
        return [_kept(layer, index) for index, layer in enumerate(own.layers)]
    pairs = [tuple(layer[:2]) for layer in own] if isinstance(own, (tuple, list)) else None
    if pairs is None or not all(len(pair) == 2 and all(torch.is_tensor(part) for part in pair) for pair in pairs):
        raise TypeError(
            "Unsupported `past_key_values` type. Expected a cache of transformers, or a tuple of (keys, values) for each "
            f"layer, got {type(cache).__name__}"
        )
    return cast("list[tuple[torch.Tensor, torch.Tensor]]", pairs)


def _kept(layer: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer of a cache of transformers."""
    if getattr(layer, "keys", None) is None:  # before transformers 4.57 nothing else says so
        raise ValueError(f"Empty `past_key_values`: layer {index} holds nothing")
    length, there = int(layer.get_seq_length()), layer.keys.shape[-2]
    if length > there:
        raise ValueError(
            f"layer {index} of `past_key_values` (a {type(layer).__name__}) has seen {length} tokens and holds {there}: the "
            "first ones are gone, or stored in another form. Run the model on fewer tokens, or with a plain DynamicCache."
        )
    return layer.keys[:, :, :length], layer.values[:, :, :length]


def note_tokens(cache: object | None, tokens: torch.Tensor) -> None:
    """Note on a cache that its first positions are `tokens`, (batch, T)."""
    if length_of(cache):
        vars(cache)[_NOTE] = tokens[:, : length_of(cache)].detach()


def tokens_in(cache: object | None, batch: int, device: torch.device) -> torch.Tensor:
    """The tokens in a cache, (batch, T), as far as they were noted; `UNKNOWN` for all others."""
    found = torch.full((batch, length_of(cache)), UNKNOWN, device=device)
    noted = None if cache is None else vars(cache).get(_NOTE) if found.shape[1] else None
    # A cache that was taken apart or put together by its rows is another one, and its note is about others.
    if isinstance(noted, torch.Tensor) and batch % len(noted) == 0:
        known = min(noted.shape[1], found.shape[1])
        found[:, :known] = noted[:, :known].to(device).repeat_interleave(batch // len(noted), 0)
    return found


def cache_of(output: object) -> object | None:
    """The cache in what a network or its `generate` returned; None where there is none."""
    # All that transformers returns is a mapping, or else a bare tensor or tuple.
    return cache_in(output) if isinstance(output, Mapping) else None


def sequences_of(output: object) -> torch.Tensor | None:
    """The tokens, (batch, T), that `generate` returned, by themselves or with what it was asked for besides."""
    found = output.get("sequences") if isinstance(output, Mapping) else output
    return found if isinstance(found, torch.Tensor) else None
