"""The hidden states in a call of a block, and in what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch

from splice.kinds.effect import Forward


class Hidden:
    """A call of a block whose first argument are the hidden states.

    Args:
        arguments: what the block's forward takes, in order.
        args: what it is called with.
        kwargs: what it is called with by name.
    """

    def __init__(self, arguments: Sequence[str], args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        self._name, self._args, self._kwargs = arguments[0], tuple(args), dict(kwargs)

    @property
    def given(self) -> torch.Tensor:
        """(batch, T, d), the hidden states."""
        return cast(torch.Tensor, self._args[0] if self._args else self._kwargs[self._name])

    def passed_to(self, run: Forward, hidden: torch.Tensor) -> object:
        """What `run` gives with other hidden states."""
        if self._args:
            return run(hidden, *self._args[1:], **self._kwargs)
        return run(**{**self._kwargs, self._name: hidden})

    def taken_from(self, output: object) -> torch.Tensor:
        """(batch, T, d), the hidden states in what the block gave."""
        return cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)
