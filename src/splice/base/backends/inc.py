"""Intel Neural Compressor: float8 layers that round their inputs as well. Adapters that add go beside them."""

from __future__ import annotations

import torch

from splice.base.backends.backend import Backend, Foreign, is_of


def _owns(layer: type, weight: type) -> bool:
    return is_of(layer, "neural_compressor", "PatchedLinear")


def _describe(layer: Foreign) -> str:
    return "float8"


def _why_unreadable(layer: Foreign) -> str:
    return "its weight is scaled in ways that only its own kernels know"


def _dense(layer: Foreign) -> torch.Tensor:
    raise NotImplementedError(_why_unreadable(layer))


BACKEND = Backend(
    name="inc",
    owns=_owns,
    is_linear=True,
    dense=_dense,
    describe=_describe,
    why_unreadable=_why_unreadable,
)
