"""FP8 as transformers has it (DeepSeek): float8 weights, and a scale for each block of them or for all.

A scale is what a stored value is multiplied with; one block's largest value is stored as the largest float8.
"""

from __future__ import annotations

import torch
from torch import nn

from splice.base.backends.backend import PARAMETERS, WEIGHT, Backend, Foreign, Place, Stored, is_of

_SCALES = Place(PARAMETERS, "weight_scale_inv")


def _owns(layer: type, weight: type) -> bool:
    return is_of(layer, "transformers", "FP8Linear")


def _block(layer: Foreign) -> tuple[int, int]:
    size_out, size_in = layer._parameters["weight"].shape
    return (size_out, size_in) if layer.block_size is None else tuple(layer.block_size)


def _spread(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """A scale for every value, (out, in)."""
    grid = scales.float().reshape(-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    return grid.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def _dense(layer: Foreign) -> torch.Tensor:
    weight: torch.Tensor = layer._parameters["weight"].detach()
    if weight.itemsize > 1:  # made, and not loaded yet
        return weight.clone()
    return weight.float() * _spread(layer._parameters["weight_scale_inv"].detach(), _block(layer), weight.shape)


def _encode(layer: Foreign, dense: torch.Tensor) -> Stored:
    weight, scales, block = layer._parameters["weight"], layer._parameters["weight_scale_inv"], _block(layer)
    rows, columns = (-(-size // side) for size, side in zip(dense.shape, block))
    padded = dense.new_zeros(rows * block[0], columns * block[1], dtype=torch.float32)
    padded[: dense.shape[0], : dense.shape[1]] = dense
    largest = padded.view(rows, block[0], columns, block[1]).abs().amax((1, 3))
    found = (largest / torch.finfo(weight.dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    found = found.reshape(scales.shape).to(scales.dtype)
    codes = (dense.float() / _spread(found, block, dense.shape)).to(weight.dtype)
    return {
        WEIGHT: nn.Parameter(codes, requires_grad=False),
        _SCALES: nn.Parameter(found, requires_grad=scales.requires_grad),
    }


def _why_unwritable(layer: Foreign) -> str:
    scales = layer._parameters["weight_scale_inv"]
    return "" if scales.dtype is torch.float32 else f"its scales are {scales.dtype}, which holds powers of two alone"


def _describe(layer: Foreign) -> str:
    return "float8" if layer.block_size is None else f"float8, blocks of {layer.block_size[0]}x{layer.block_size[1]}"


BACKEND = Backend(
    name="fp8",
    owns=_owns,
    is_linear=False,
    dense=_dense,
    describe=_describe,
    why_unwritable=_why_unwritable,
    encode=_encode,
    places=(WEIGHT, _SCALES),
)
