"""The kind that adds to the output of a block: a module that is called with keywords, and gives a tuple."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from splice.base.foreign_models import checkpointing_places
from splice.base.signatures import named_arguments
from splice.kinds.effect import Action, Effect, Forward
from splice.kinds.layer import AdapterLayer, Config
from splice.selection import Rows

# What the hidden states are called that a block is given.
_HIDDEN = "hidden_states"


class AddsToBlock(AdapterLayer):
    """`y + added(x)`, with the hidden states x that a block is given, (batch, T, hidden), and what it makes of them, y."""

    action = Action.ADDS
    # The parameters of the target's own forward.
    arguments: tuple[str, ...]

    def prepare(self, base: nn.Module, config: Config, path: str) -> None:
        self.arguments = named_arguments(base)

    def added(self, hidden: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        """(batch, T, hidden): what is added to the first output; `call` are all arguments of the block, by name."""
        raise NotImplementedError

    def of_rows(self, call: Mapping[str, Any], rows: torch.Tensor) -> Mapping[str, Any]:
        """`call` for some rows of the batch alone, as far as `added` reads it."""
        raise NotImplementedError

    def wrapped(self, inner: Forward) -> Forward:
        def run(*args: object, **kwargs: object) -> object:
            output = inner(*args, **kwargs)
            call = self.bound(args, kwargs)
            first = output[0] if isinstance(output, tuple) else output
            return _with_first(output, first + self.added(call[_HIDDEN], call).to(first.dtype))

        return run

    @classmethod
    def wrapped_rows(cls, layers: Mapping[str, Effect], rows: Rows, inner: Forward) -> Forward:
        """As `wrapped`, with an adapter for each row."""

        def run(*args: object, **kwargs: object) -> object:
            output = inner(*args, **kwargs)
            first = (output[0] if isinstance(output, tuple) else output).clone()
            for group in rows.groups(len(first), first.device):
                layer = layers.get(group.name)
                if layer is None:  # that adapter is on other blocks
                    continue
                assert isinstance(layer, AddsToBlock)
                call = layer.bound(args, kwargs)
                of_rows = layer.of_rows(call, group.indices)
                first[group.indices] += layer.added(call[_HIDDEN][group.indices], of_rows).to(first.dtype)
            return _with_first(output, first)

        return run

    def bound(self, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(zip(self.arguments, args)), **kwargs}


def _with_first(output: object, first: torch.Tensor) -> object:
    return (first, *output[1:]) if isinstance(output, tuple) else first


@contextmanager
def around_checkpoints(network: nn.Module, around: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """Inside, what is put around a block stands outside of the checkpoint by which it computes itself again in a backward.

    What travels from block to block beside the hidden states has its own way through the graph then, and the checkpoint
    sees the block alone.

    Args:
        network: that holds the blocks.
        around: what is called in the place of a block, given the block and what computes it with its checkpoint.
    """
    found = checkpointing_places(network.modules())
    kept = [(place, place.forward) for _, place in found]
    try:
        for module, place in found:
            place.put(partial(_checkpointed, place.forward, around, module))
        yield
    finally:
        for place, before in kept:
            place.put(before)


def _checkpointed(
    checkpoint: Forward, around: Callable[[nn.Module, Forward], Forward], owner: nn.Module, run: Forward, *args: object
) -> object:
    # A block has the function itself, or what calls it has it: then `run` is the block, or a method of it.
    block = run.__self__ if isinstance(run, MethodType) else run
    return around(block if isinstance(block, nn.Module) else owner, partial(checkpoint, run))(*args)
