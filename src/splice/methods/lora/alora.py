"""aLoRA: LoRA that takes effect from its invocation on, and leaves what stands before it to the base.

Greenewald et al., "Activated LoRA: Fine-tuned LLMs for Intrinsics", arXiv 2504.12397, section 3. The invocation is a
sequence of tokens; its last occurrence in a row counts. The cache of everything before it is the base model's own, so a
prompt that the base has cached may be continued with the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from splice.base.caches import cache_in, cache_of, length_of, note_tokens, sequences_of, tokens_in
from splice.base.foreign_models import field_of
from splice.base.routing import gets_sorted_tokens
from splice.config import PeftConfig
from splice.errors import PeftWarning, warn
from splice.kinds.adapters import Adapters
from splice.kinds.call import Call, ReadsCall, Telling
from splice.kinds.effect import Forward
from splice.kinds.scale import add_scaled
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.layers import OnLinear

Tokens = tuple[int, ...]
# The position of an invocation that is nowhere: behind all others.
NOWHERE = 1 << 40


class Window(NamedTuple):
    """The positions that a network computes in one of its calls; those before them are in its cache."""

    # The position of the first token.
    first: int
    # The number of tokens.
    steps: int
    # The number of rows.
    batch: int


@dataclass
class Invocations:
    """Where the invocations of a call begin.

    Attributes:
        starts: tokens of an invocation -> (batch), the position from which its adapters take effect; `NOWHERE` for none.
        window: the positions that the network computes now.
    """

    starts: Mapping[Tokens, torch.Tensor]
    window: Window

    def active(self, tokens: Tokens, device: torch.device) -> torch.Tensor:
        """(batch, T): the positions of the window at which the adapter takes effect."""
        first, steps, batch = self.window
        starts = self.starts[tokens].to(device)
        if batch != len(starts):  # several sequences for one prompt
            starts = starts.repeat_interleave(batch // len(starts))
        return torch.arange(first, first + steps, device=device) >= starts.unsqueeze(1)


_of_this_call: Telling[Invocations] = Telling("aLoRA", "invocations")


class AloraLinear(ReadsCall, OnLinear):
    """aLoRA on a linear layer, stored either way round."""

    mergeable = False

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.tokens, self.path = _tokens_of(config), path
        self.sorted_tokens = gets_sorted_tokens(path)

    @classmethod
    def call_context(cls, adapters: Adapters, names: Sequence[str], call: Call) -> AbstractContextManager[None]:
        return _invoked(adapters, names, call)

    def wrapped_for(self, inner: Forward, rows: torch.Tensor, batch: int) -> Forward:
        return lambda x: self._at(x, inner, rows)

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        return self._at(x, inner, None)

    def _at(self, x: torch.Tensor, inner: Forward, rows: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = inner(x)
        invocations = _of_this_call.heard_by(self)
        if invocations is None:
            return y
        mask = self._mask(invocations, x, rows)
        h = self.cast_input(x[mask])
        if self.dropout and self.training:
            h = nn.functional.dropout(h, self.dropout)
        changed = add_scaled(y[mask], self.delta(h), self.scale).to(y.dtype)
        return y.index_put((mask,), changed)

    def _mask(self, invocations: Invocations, x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Where in `x`, (rows, T, in) or (rows * T, in), the adapter takes effect: a mask of its shape without the last.

        Raises:
            ValueError: that cannot be told, as of tokens that were sorted to experts.
        """
        active = invocations.active(self.tokens, x.device)
        if rows is not None:
            # Of a batch that was flattened the rows are tokens.
            active = (active.reshape(-1, 1) if x.dim() < 3 else active)[rows]
        if x.dim() == 3 and len(x) == len(active) and x.shape[1] <= active.shape[1]:
            return active[:, active.shape[1] - x.shape[1] :]  # of the head, which may be given the last tokens alone
        if self.sorted_tokens or x.shape[:-1].numel() != active.numel():
            if bool(active.all()) or not bool(active.any()):  # then it does not matter which token is which
                return active.new_full(x.shape[:-1], bool(active.any()))
            raise ValueError(
                f"{self.path}: aLoRA cannot tell which tokens its input {tuple(x.shape)} consists of: the network sorts "
                "them, to experts for example. Leave this layer out of target_modules."
            )
        return active.reshape(x.shape[:-1])


def _tokens_of(config: PeftConfig) -> Tokens:
    assert isinstance(config, LoraConfig) and config.alora_invocation_tokens is not None
    return tuple(config.alora_invocation_tokens)


@contextmanager
def _invoked(adapters: Adapters, names: Sequence[str], call: Call) -> Iterator[None]:
    """Inside, the adapters `names` know where they were invoked by the tokens of the call."""
    ids, given = call.input_ids, call.options.pop("alora_offsets", None)
    if ids is None and given is None:
        _warn_off()
        yield
        return
    if call.generates and _beams(adapters, call) > 1:
        raise ValueError("aLoRA does not support beam search (`num_beams` > 1): rows change places between steps.")
    tokens = {_tokens_of(adapters.peft_config[name]) for name in names}
    seen = _seen(call)
    window = Window(seen.cached, seen.length - seen.cached, seen.batch)
    invocations = Invocations(_all_starts(tokens, seen, given), window)
    follows = _following(adapters.model, invocations) if call.generates else nullcontext()
    with _of_this_call.during(adapters, invocations), follows:
        yield
    _note(call, seen)


class _Seen(NamedTuple):
    """What a call is about, with what is in its cache already."""

    # All tokens, (batch, length), from the first in the cache to the last of the call; None where there are none.
    ids: torch.Tensor | None
    # How many rows there are.
    batch: int
    # How many positions, those in the cache included.
    length: int
    # How many positions are in the cache.
    cached: int


def _seen(call: Call) -> _Seen:
    cache = cache_in(call.options)
    cached, ids = length_of(cache), call.input_ids
    if ids is None:
        embedded = call.options.get("inputs_embeds")
        batch, length = embedded.shape[:2] if isinstance(embedded, torch.Tensor) else (1, 0)
        return _Seen(None, batch, cached + length, cached)
    ids = ids.reshape(-1, ids.shape[-1])
    # `generate` is given all tokens, also those in the cache; a forward is given those that are new.
    if cached and not (call.generates and ids.shape[1] > cached):
        ids = torch.cat([tokens_in(cache, len(ids), ids.device), ids], 1)
    return _Seen(ids, len(ids), ids.shape[1], cached)


def _all_starts(
    tokens: Iterable[Tokens], seen: _Seen, given: Sequence[int | None] | None
) -> dict[Tokens, torch.Tensor]:
    """(batch) for each invocation: where it begins. `given` are the caller's own, counted from the end."""
    if given is None:
        assert seen.ids is not None
        return {sequence: _starts(seen.ids, sequence) for sequence in tokens}
    starts = torch.tensor([NOWHERE if offset is None else seen.length - offset for offset in given])
    return dict.fromkeys(tokens, starts)


@contextmanager
def _following(network: nn.Module, invocations: Invocations) -> Iterator[None]:
    """Inside, `invocations` know which positions the network computes at each of its calls.

    `generate` alone decides that: all of them each time, those that are not in the cache, or the prompt in pieces.
    """

    def look(_: nn.Module, args: tuple[object, ...], options: dict[str, object]) -> None:
        named = (options.get("input_ids"), options.get("inputs_embeds"), *args)
        main = next((value for value in named if isinstance(value, torch.Tensor)), None)
        # Another thread may call the network meanwhile.
        if main is not None and _of_this_call.now is invocations:
            invocations.window = Window(length_of(cache_in(options)), main.shape[1], len(main))

    hook = network.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _note(call: Call, seen: _Seen) -> None:
    """Note on the cache of a call that is done which tokens are in it now."""
    cache = cache_in(call.options) or cache_of(call.result)
    ids = _after_all_cached(sequences_of(call.result), call, seen) if call.generates else seen.ids
    if cache is not None and ids is not None:
        note_tokens(cache, ids)


def _after_all_cached(sequences: torch.Tensor | None, call: Call, seen: _Seen) -> torch.Tensor | None:
    """The tokens that `generate` returned, behind those in its cache where it was given the new ones alone."""
    if sequences is None or seen.ids is None or call.input_ids is None:
        return None
    before = seen.ids[:, : seen.length - call.input_ids.shape[-1]]
    return torch.cat([before.repeat_interleave(len(sequences) // len(before), 0), sequences], 1)


def _starts(rows: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """(batch): the index of the last occurrence of `tokens` in each of `rows`; `NOWHERE` where there is none."""
    length, count = rows.shape[1], len(tokens)
    if not count or count > length:
        return torch.full((len(rows),), NOWHERE, device=rows.device)
    hits = (rows.unfold(1, count, 1) == torch.tensor(tokens, device=rows.device)).all(-1)
    places = torch.arange(hits.shape[1], device=rows.device)
    last = torch.where(hits, places, -1).max(1).values
    return torch.where(last < 0, NOWHERE, last)


def _beams(adapters: Adapters, call: Call) -> int:
    given = (
        call.options.get("num_beams"),
        field_of(call.options.get("generation_config"), "num_beams"),
        field_of(adapters.model.generation_config, "num_beams"),
    )
    return next((beams for beams in given if isinstance(beams, int)), 1)


def _warn_off() -> None:
    text = "aLoRA needs `input_ids` to find its invocation; without them the adapter has no effect in this call."
    warn(text, PeftWarning)
