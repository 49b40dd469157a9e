"""`DoraCaching`: DoRA without measuring the same weight at every call."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Measured(NamedTuple):
    """Norms of a weight, and what they were measured on."""

    # Of each tensor: where its values lie, and how often they were changed; then the scale.
    of: tuple[object, ...]
    # n(W + D).
    norm: torch.Tensor


class DoraCaching:
    """Inside, layers with DoRA that are in eval mode keep the norms they have measured: faster, for a little memory.

    They are measured again when a tensor that they follow from is another one, or was changed in place. Changes through
    `.data`, of which tensors know nothing, are not seen; that is why it has to be asked for.

        with DoraCaching():
            output = model(inputs)

        caching = DoraCaching()
        caching(enabled=True)  # until `caching(enabled=False)`
    """

    # Whether norms are kept now, by all models.
    on: bool = False

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: list[bool] = []

    def __call__(self, enabled: bool = True) -> None:
        DoraCaching.on = enabled

    def __enter__(self) -> None:
        self._before.append(DoraCaching.on)
        DoraCaching.on = self.enabled

    def __exit__(self, *error: object) -> None:
        DoraCaching.on = self._before.pop()


def state_of(tensors: tuple[torch.Tensor | None, ...]) -> tuple[object, ...]:
    """What tells whether any of these tensors has become another one, or was changed."""
    return tuple(
        None if t is None else (id(t), t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors
    )
