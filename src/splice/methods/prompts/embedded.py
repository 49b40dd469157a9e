"""The kind of prompt that stands among the embedded inputs: [P; E] and a mask with ones in front.

With n virtual tokens P (n, dim) and the embedded input E (batch, T, dim), the network gets n + T tokens, and its output is
that long. While a decoder generates, P goes in with the first step and stays in the cache. Of an encoder-decoder the encoder
gets it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.foreign_models import input_embedding_layer
from splice.checkpoint.types import TaskType
from splice.errors import warn
from splice.kinds.adapters import Adapters
from splice.kinds.casting import check_values
from splice.kinds.effect import Forward
from splice.kinds.layer import AdapterLayer
from splice.kinds.network import network_layers
from splice.methods.prompts.cache import Cache
from splice.methods.prompts.prompt import TYPED, Call, Prompt, PromptLayer, main_input, prompt_of_rows
from splice.selection import Choice, Rows

# The models that answer for every token: their labels grow with the input.
_ONE_LABEL_A_TOKEN = (TaskType.CAUSAL_LM, TaskType.TOKEN_CLS)
# While `generate` of a PeftModel runs: the encoder has been called already, with the virtual tokens.
_encoded: ContextVar[bool] = ContextVar("splice_encoded", default=False)


class EmbeddedPrompt(PromptLayer):
    """Virtual tokens in the place of embedded ones."""

    drops_positions: ClassVar[bool] = True

    def virtual_tokens(self, call: Call) -> torch.Tensor:
        # Of two submodules the first half is the encoder's; nothing reads the other.
        return self.every_token(None)[:, : self.count]

    def prompted(self, call: Call, prompt: Prompt, inner: Forward) -> object:
        if call.get("encoder_outputs") is not None:
            if _encoded.get():
                return inner(**call)
            raise ValueError(
                "`encoder_outputs` were made without the virtual tokens of the active adapter. Give the encoder's input "
                "instead, and call `generate` of the PeftModel, not of its base model."
            )
        self.leave_out(call)
        cache = self.cache_in(call)
        past = 0 if cache is None else cache.get_seq_length()
        _refuse_fixed(cache)
        main = main_input(call, ("inputs_embeds", "input_ids"))
        length = main.shape[1]
        self.set_mask(call, "attention_mask", prompt, length, past)
        new = length if past else length + prompt.count
        self.set_positions(call, "position_ids", prompt, new, past)
        return inner(**(call if past else self.in_front_of_decoder(self.in_front(call, prompt), prompt)))

    def in_front_of_decoder(self, call: Call, prompt: Prompt) -> Call:
        """`call` with virtual tokens in front of what the decoder gets, of methods that have such."""
        return call

    def in_front(self, call: Call, prompt: Prompt) -> Call:
        """`call` with embedded inputs that begin with the virtual tokens; everything that goes by tokens grows."""
        embeds, ids = call.get("inputs_embeds"), call.pop("input_ids", None)
        if embeds is None:
            embeds = embeddings_of(self.base)(ids)
        tokens = prompt.values(call, embeds.shape[0])
        check_values(tokens, embeds)
        tokens = tokens.to(embeds.dtype)
        call["inputs_embeds"] = torch.cat([tokens, embeds], dim=1)
        if call.get("labels") is not None and self.task in _ONE_LABEL_A_TOKEN:
            call["labels"] = F.pad(call["labels"], (prompt.count, 0), value=-100)
        if call.get("token_type_ids") is not None:
            call["token_type_ids"] = F.pad(call["token_type_ids"], (prompt.count, 0), value=0)
        return call

    def leave_out(self, call: Call) -> None:
        """Take away what cannot be right with virtual tokens in front: the model works it out again."""
        for name in ("position_ids", "cache_position", "task_ids"):
            call.pop(name, None)
        self.drop_types(call, unless=TYPED)

    @classmethod
    def generate_of(cls, adapters: Adapters) -> Forward:
        return partial(_generate, adapters)

    def encoder_inputs(self, call: Call, prompt: Prompt) -> Call:
        """The arguments of `generate` of an encoder-decoder, with the virtual tokens in the encoder's input."""
        if call.pop("encoder_outputs", None) is not None:
            warn("`encoder_outputs` were made without virtual tokens. They are ignored.")
        self.leave_out(call)
        self.set_mask(call, "attention_mask", prompt, call["input_ids"].shape[1], 0)
        return self.in_front(call, prompt)


def _refuse_fixed(cache: Cache | None) -> None:
    if cache is not None and cache.is_compileable:
        raise ValueError(
            f"a {type(cache).__name__} has no room for virtual tokens; use a cache that grows (for `generate`: leave out "
            "`cache_implementation`)"
        )


def embeddings_of(network: nn.Module) -> nn.Module:
    """The layer that embeds what `network` is called with.

    Raises:
        ValueError: it has none.
    """
    found = input_embedding_layer(network)
    if found is None:
        raise ValueError(
            f"{type(network).__name__} has no `get_input_embeddings`: virtual tokens have nowhere to stand"
        )
    return found


def _generate(adapters: Adapters, *args: Any, **kwargs: Any) -> object:
    """`generate` of an encoder-decoder, which calls the encoder past the network: it gets the virtual tokens here."""
    generate = cast("Forward", adapters.model.generate)
    layers = network_layers(adapters)
    choice = adapters.selection.current()
    if choice.rows is None and not choice.names:
        return generate(*args, **kwargs)
    if args:
        raise TypeError("`generate` with virtual tokens takes its arguments by name (`input_ids=...`)")
    if kwargs.get("input_ids") is None:
        raise ValueError("`generate` with virtual tokens needs `input_ids`")
    prompt = _chosen(layers, choice, kwargs["input_ids"])
    if prompt is not None:
        first = prompt.parts[0][0]
        assert isinstance(first, EmbeddedPrompt)
        kwargs = first.encoder_inputs(kwargs, prompt)
    with encoded():
        return generate(**kwargs)


def _chosen(layers: Mapping[str, AdapterLayer], choice: Choice, main: torch.Tensor) -> Prompt | None:
    if isinstance(choice.rows, Rows):
        return prompt_of_rows(layers, choice.rows, main)
    layer = layers[choice.names[0]]
    assert isinstance(layer, EmbeddedPrompt)
    return Prompt(((layer, None),), layer.count)


@contextmanager
def encoded() -> Iterator[None]:
    """Inside, outputs of an encoder hold the virtual tokens."""
    token = _encoded.set(True)
    try:
        yield
    finally:
        _encoded.reset(token)
