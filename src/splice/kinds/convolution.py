"""Convolutions of one, two and three dimensions: what an adapter layer on one asks of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

_OPERATIONS: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def as_convolution(base: nn.Module) -> Convolution:
    """`base`, which is a convolution: a record puts such an adapter layer on nothing else."""
    # For the type alone. The base of a layer may be any module, and what it takes cannot be narrower in one class of them.
    assert isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return base


def convolve(base: Convolution) -> Callable[..., torch.Tensor]:
    """torch's function for a convolution of as many dimensions: `F.conv2d` and its like."""
    # By the kernel, not by the class: of subclasses there may be any number.
    return _OPERATIONS[len(base.kernel_size)]
