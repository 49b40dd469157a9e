"""A call of the trunk with shadows beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from splice.base.caches import cache_in
from splice.base.foreign_models import uses_checkpointing
from splice.base.signatures import named_arguments
from splice.kinds.block import around_checkpoints
from splice.kinds.effect import Forward
from splice.kinds.host import host_of
from splice.methods.shadow.blocks import ShadowBlock
from splice.methods.shadow.caches import Half, cache_in_output
from splice.methods.shadow.states import HEARD, STATES, State, States


class First(NamedTuple):
    """What a shadow network makes of the input of a call."""

    # (batch, T, d), the state before the first block.
    state: torch.Tensor
    # The cache of the shadow network, with these tokens in it; None where none is kept.
    cache: object | None


class Source(Protocol):
    """A shadow network."""

    def of_call(self, call: Mapping[str, Any], cache: object | None, use_cache: bool | None) -> First | None:
        """What it makes of the input; None where there are neither tokens nor embedded ones.

        Args:
            call: the arguments of the trunk, by name.
            cache: of the shadow network, with the tokens before these.
            use_cache: whether it keeps one; None for what it does by itself.
        """
        ...

    def of_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, T, d), the state that it makes of the input of the first block, of the same shape."""
        ...


def call_trunk(
    sources: Mapping[str, Source],
    trunk: nn.Module,
    inner: Forward,
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> object:
    """What `inner`, the forward of the trunk, gives with these shadow networks beside it, by adapter name."""
    call = {**dict(zip(named_arguments(trunk), args)), **kwargs}
    given, states, halves = cache_in(call), States({}), dict[str, Half]()
    again = trunk.training and torch.is_grad_enabled() and uses_checkpointing(trunk.modules())
    use_cache = None if call.get("use_cache") is None else bool(call["use_cache"])
    if again or given is not None:
        use_cache = not again
    for name, source in sources.items():
        half = Half.of(given, name)
        first = source.of_call(call, half.cache, use_cache)
        states.of[name] = State(source.of_hidden, None if first is None else first.state)
        if first is not None:
            halves[name] = half._replace(cache=first.cache)
            heard = HEARD.now
            if heard is not None:
                heard.begun[name] = first.state
    with ExitStack() as stack:
        stack.enter_context(STATES.during(None, states))
        if again:
            stack.enter_context(around_checkpoints(trunk, _outside))
        output = inner(*args, **kwargs)
    whole = cache_in_output(output) if given is None else given
    for half in halves.values():
        half.joined_to(whole)
    return output


def _outside(block: nn.Module, run: Forward) -> Forward:
    """What takes the place of a block with its checkpoint."""
    states, host = STATES.now, host_of(block)
    for name in () if states is None else states.of:
        layer = None if host is None else host.layers.get(name)
        if isinstance(layer, ShadowBlock):
            return layer.around_checkpoint(run)
    return run
