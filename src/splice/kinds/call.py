"""What a PeftModel was called with, for methods that must know it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch

from splice.base.foreign_models import uses_checkpointing
from splice.kinds.adapters import Adapters

T = TypeVar("T")


@dataclass(eq=False, repr=False)
class Call:
    """One call of a PeftModel."""

    # The tokens, (batch, T), if it was given any.
    input_ids: torch.Tensor | None
    # All named arguments, as they are passed on.
    options: dict[str, Any]
    # Whether it is a call of `generate`.
    generates: bool
    # What it returned; None before it has.
    result: object = None


class ReadsCall(ABC):
    """An ability of adapter layers: they know what the PeftModel was called with."""

    # What the layer was told in the last call whose blocks compute themselves again in the backward; None before one.
    last_told: object = None

    @classmethod
    @abstractmethod
    def call_context(cls, adapters: Adapters, names: Sequence[str], call: Call) -> AbstractContextManager[None]:
        """What holds while the PeftModel is called.

        Args:
            adapters: those of the model.
            names: its adapters with such layers.
            call: what it was called with; options that are not the base model's are taken out.
        """


@dataclass(eq=False, repr=False)
class _Told(Generic[T]):
    """What the layers are told of one call."""

    # That which they are told.
    what: T
    # Whether blocks compute themselves again in the backward.
    recomputed: bool
    # Whether a block that computed itself again has asked for it.
    used: bool = False
    # Whether another call of this kind came before such a block had asked for what it was told in the one before.
    ambiguous: bool = False


class Telling(Generic[T]):
    """The way from a call to the adapter layers of one kind, also to those in blocks that its backward computes again.

    There is no call then. A layer goes on with what it was told last, which is right while each forward has its backward
    before the next one; where two came one after the other, nobody can tell the blocks of one from those of the other.
    """

    def __init__(self, method: str, what: str) -> None:
        """For a method, and what its layers are told, as messages call them."""
        self.method, self.what = method, what
        self._running: ContextVar[_Told[T] | None] = ContextVar(f"splice_{what.replace(' ', '_')}", default=None)

    @contextmanager
    def during(self, adapters: Adapters | None, what: T) -> Iterator[None]:
        """Inside, the layers are told this; without `adapters` for layers that no backward computes again."""
        # In training alone: the question walks through all modules.
        again = adapters is not None and adapters.training and torch.is_grad_enabled()
        recomputed = again and adapters is not None and uses_checkpointing(adapters.model.modules())
        token = self._running.set(_Told(what, recomputed))
        try:
            yield
        finally:
            self._running.reset(token)

    @property
    def now(self) -> T | None:
        """What the layers of the running call are told; None outside of one."""
        told = self._running.get()
        return None if told is None else told.what

    def heard_by(self, layer: ReadsCall) -> T | None:
        """What a layer is told in the running call; in that of its last call, where a backward computes a block again.

        Raises:
            ValueError: there were two such calls.
        """
        told, last = self._running.get(), cast("_Told[T] | None", layer.last_told)
        if told is not None:
            if told.recomputed and told is not last:
                told.ambiguous |= last is not None and not last.used
                layer.last_told = told
            return told.what
        if (
            last is None or torch._C._current_graph_task_id() == -1
        ):  # outside of any backward: the network is called alone
            return None
        if last.ambiguous:
            raise ValueError(
                f"{self.method}: with gradient checkpointing there were two forwards with other {self.what} before one "
                "backward, and blocks that are computed again cannot tell them apart. Call `backward` after each forward."
            )
        last.used = True
        return last.what
