"""bitsandbytes, 4 bit: blocks of codes for values of one table (nf4, fp4), each block with its largest absolute value.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3. The scales of the blocks may be
quantised themselves ("double"). What the codes mean stands in a state beside the parameter.
"""

from __future__ import annotations

import copy

import torch

from splice.base.backends.backend import OWN, WEIGHT, Backend, Foreign, Place, Stored, is_of, library_of, values_in

_STATE = Place(OWN, "quant_state")


def _owns(layer: type, weight: type) -> bool:
    return is_of(layer, "bitsandbytes", "Linear4bit", "Embedding4bit") and is_of(weight, "bitsandbytes", "Params4bit")


def _weight(layer: Foreign) -> Foreign:
    return layer._parameters["weight"]


def _dense(layer: Foreign) -> torch.Tensor:
    weight = _weight(layer)
    state = weight.quant_state
    if state is None:  # not moved yet to where it is to be used, which is when it is quantised
        return values_in(weight).clone()
    codes = values_in(weight)
    if vars(state).get("packing_format_for_cpu"):
        # In an order that one kind of processor is fastest with. The library's way back writes into the state.
        unpack = library_of(weight, "bitsandbytes.nn.modules")._convert_weight_packed_for_cpu_inverse
        codes, state = unpack(codes, copy.copy(state))
    dense: torch.Tensor = library_of(weight, "bitsandbytes").functional.dequantize_4bit(codes, state)
    return dense


def _encode(layer: Foreign, dense: torch.Tensor) -> Stored:
    weight = _weight(layer)
    make = type(weight)
    was = weight.quant_state
    new = make(
        dense if was is None else dense.to(was.dtype),
        requires_grad=False,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
    )
    if was is not None:
        new = new.to(weight.device)  # which quantises
    return {WEIGHT: new, _STATE: new.quant_state}


def _describe(layer: Foreign) -> str:
    weight = _weight(layer)
    double = ", double" if weight.compress_statistics else ""
    return f"4 bit, {weight.quant_type}, blocks of {weight.blocksize}{double}"


def codes_in(parameter: Foreign) -> int | None:
    """How many values the codes in `parameter` stand for; None of one that holds no such codes."""
    if not is_of(type(parameter), "bitsandbytes", "Params4bit") or parameter.quant_state is None:
        return None
    # Two codes to a byte; the bytes may be stored as items of another dtype.
    return int(parameter.numel()) * 2 * int(parameter.quant_storage.itemsize)


def _dtype(layer: Foreign) -> torch.dtype | None:
    found: torch.dtype | None = layer.compute_dtype
    return found


BACKEND = Backend(
    name="bnb 4bit",
    owns=_owns,
    is_linear=False,
    dense=_dense,
    describe=_describe,
    encode=_encode,
    places=(WEIGHT, _STATE),
    dtype=_dtype,
)
