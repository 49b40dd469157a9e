"""`DoraCaching`: DoRA without reading the same weight at every call."""

from __future__ import annotations

import torch


class DoraCaching:
    """Inside, layers with DoRA that are in eval mode do not look whether values have changed, but ask tensors alone.

    The norms that they keep are measured again when a tensor that they follow from is another one, or was changed in place.
    Changes through `.data`, of which tensors know nothing, are not seen; that is why it has to be asked for.

        with DoraCaching():
            output = model(inputs)

        caching = DoraCaching()
        caching(enabled=True)  # until `caching(enabled=False)`
    """

    # Whether tensors are asked now, by all models.
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
