"""aLoRA: LoRA that takes effect from its invocation on, and leaves what stands before it to the base.

Greenewald et al., "Activated LoRA: Fine-tuned LLMs for Intrinsics", arXiv 2504.12397, section 3. The invocation is a
sequence of tokens; its last occurrence in a row counts. The cache of everything before it is the base model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import nn

from splice.base.foreign_models import field_of, uses_checkpointing
from splice.config import PeftConfig
from splice.errors import PeftWarning, warn
from splice.kinds.adapters import Adapters
from splice.kinds.call import Call, ReadsCall
from splice.kinds.effect import Forward
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.layers import OnLinear

Tokens = tuple[int, ...]
_RECOMPUTED_TWICE = (
    "aLoRA: with gradient checkpointing there were two forwards with other invocations before one backward, and blocks that "
    "are computed again cannot tell them apart. Call `backward` after each forward."
)


@dataclass
class Invocations:
    """Where the invocations of a call begin.

    Attributes:
        length: the number of tokens that the call was given.
        starts: tokens of an invocation -> (batch), the index from which its adapters take effect; `length` for nowhere.
        recomputed: whether blocks compute themselves again in the backward.
    """

    length: int
    starts: Mapping[Tokens, torch.Tensor]
    recomputed: bool = False
    # Whether a block that computed itself again has asked for these.
    used: bool = field(default=False, compare=False)

    def mask(self, tokens: Tokens, x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """(batch, T): the positions of `x` (batch, T, ...) or (batch, ...) at which the adapter takes effect.

        A step of generation with a cache gets fewer tokens than there were: they come after all of them.
        """
        starts = self.starts[tokens].to(x.device)
        if rows is not None:
            starts = (
                starts.repeat_interleave(max(int(rows.max()) // len(starts) + 1, 1))[rows] if len(rows) else starts[:0]
            )
        elif len(starts) != len(x):  # several sequences for one prompt
            starts = starts.repeat_interleave(len(x) // len(starts))
        steps = x.shape[1] if x.dim() > 2 else 1
        if steps < self.length:
            return (starts < self.length).unsqueeze(1).expand(-1, steps)
        return torch.arange(steps, device=x.device) >= torch.where(starts < self.length, starts, steps).unsqueeze(1)


_of_this_call: ContextVar[Invocations | None] = ContextVar("splice_invocations", default=None)


class AloraLinear(ReadsCall, OnLinear):
    """aLoRA on a linear layer, stored either way round."""

    mergeable = False
    last: Invocations | None = None
    ambiguous: bool = False

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.tokens = _tokens_of(config)

    @classmethod
    def call_context(cls, adapters: Adapters, names: Sequence[str], call: Call) -> AbstractContextManager[None]:
        return _invoked(adapters, names, call)

    def wrapped_for(self, inner: Forward, rows: torch.Tensor) -> Forward:
        return lambda x: self._at(x, inner, rows)

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        return self._at(x, inner, None)

    def _at(self, x: torch.Tensor, inner: Forward, rows: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = inner(x)
        invocations = self._invocations()
        if invocations is None:
            return y
        mask = invocations.mask(self.tokens, x, rows)
        mask = mask if x.dim() > 2 else mask[:, 0]
        h = self.cast_input(x[mask])
        if self.dropout and self.training:
            h = nn.functional.dropout(h, self.dropout)
        changed = torch.add(y[mask], self.delta(h), alpha=self.scale).to(y.dtype)
        return y.index_put((mask,), changed)

    def _invocations(self) -> Invocations | None:
        """Those of the running call; of the last one, where the backward computes a block again.

        Raises:
            ValueError: there were two such calls.
        """
        found = _of_this_call.get()
        if found is None:
            if torch._C._current_graph_task_id() == -1:  # outside of any backward: the network is called without us
                return None
            if self.ambiguous:
                raise ValueError(_RECOMPUTED_TWICE)
            if self.last is not None:
                self.last.used = True
            return self.last
        if found.recomputed and found is not self.last:
            self.ambiguous = self.last is not None and not self.last.used
            self.last = found
        return found


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
    length = ids.shape[-1] if ids is not None else max((offset or 0) for offset in given)
    if given is not None:
        starts = torch.tensor([length if offset is None else length - min(offset, length) for offset in given])
        found = dict.fromkeys(tokens, starts)
    else:
        assert ids is not None
        rows = ids.reshape(-1, length)
        found = {sequence: _starts(rows, sequence) for sequence in tokens}
    # In training alone: the question walks through all modules.
    again = adapters.training and torch.is_grad_enabled()
    recomputed = again and uses_checkpointing(adapters.model.modules())
    token = _of_this_call.set(Invocations(length, found, recomputed))
    try:
        yield
    finally:
        _of_this_call.reset(token)


def _starts(rows: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """(batch): the index of the last occurrence of `tokens` in each of `rows`; their length where there is none."""
    length, count = rows.shape[1], len(tokens)
    if not count or count > length:
        return torch.full((len(rows),), length, device=rows.device)
    hits = (rows.unfold(1, count, 1) == torch.tensor(tokens, device=rows.device)).all(-1)
    places = torch.arange(hits.shape[1], device=rows.device)
    last = torch.where(hits, places, -1).max(1).values
    return torch.where(last < 0, length, last)


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
