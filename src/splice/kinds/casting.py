"""Inputs in the dtype of an adapter's tensors."""

from __future__ import annotations

import torch

from splice.kinds.computing import computing

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

    So does everything on a layer that was told to leave its inputs (`helpers.disable_input_dtype_casting`).

    Raises:
        RuntimeError: `own` has no values.
    """
    check_values(own, x)
    if x.dtype is own.dtype or not x.is_floating_point():
        return x
    # Asked of the running layer and not handed in: only where the dtypes differ does anybody want to know.
    running = computing.stack
    return x if running and not running[-1][0].casts_input else x.to(own.dtype)
