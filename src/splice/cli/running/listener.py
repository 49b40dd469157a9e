"""What hears each token as `generate` makes it: when the first one came, and which they were."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class Listener:
    """A streamer of transformers, for batches of any size.

    Args:
        heard: called with it after each new token of the batch.
    """

    def __init__(self, heard: Callable[[Listener], object]) -> None:
        self._heard = heard
        self._start = time.perf_counter()
        # Whether the input has come: `generate` gives that first.
        self._begun = False
        # Seconds to the first token, and to the last one; None before.
        self.first: float | None = None
        self.last: float | None = None
        # One tensor (rows,) for each step.
        self.steps: list[torch.Tensor] = []

    def put(self, tokens: torch.Tensor) -> None:
        """The input, and then the next token of each row."""
        if not self._begun:
            self._begun = True
            return
        self.last = time.perf_counter() - self._start
        self.first = self.last if self.first is None else self.first
        self.steps.append(tokens.reshape(-1))
        self._heard(self)

    def end(self) -> None:
        """Nothing more comes."""

    def row(self, row: int) -> list[int]:
        """The tokens of one row so far; behind the end of its text they are padding."""
        return [int(tokens[row]) for tokens in self.steps]
