"""Inputs in the dtype of an adapter's tensors."""

from __future__ import annotations

import torch

OFFLOADED = (
    "the adapter's tensors are on the meta device: they were left empty (low_cpu_mem_usage), or offloaded by hooks that came "
    "after the adapter. Dispatch or offload the base model first, then load the adapter."
)


def check_values(own: torch.Tensor, x: torch.Tensor) -> None:
    """Raise where `own`, a tensor of an adapter, has no values to compute with `x`.

    Raises:
        RuntimeError: it is on the meta device, and `x` is not.
    """
    if own.is_meta and not x.is_meta:
        raise RuntimeError(OFFLOADED)


def cast_to(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The input `x` in the dtype of `own`, a tensor of an adapter; indices stay as they are.

    Raises:
        RuntimeError: `own` has no values.
    """
    check_values(own, x)
    return x if x.dtype is own.dtype or not x.is_floating_point() else x.to(own.dtype)
