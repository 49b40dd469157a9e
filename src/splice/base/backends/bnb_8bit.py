"""bitsandbytes, 8 bit: each row of the weight as whole numbers, and its largest absolute value.

Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv 2208.07339. The layer rounds its
inputs too, so its output is not quite that of its dense weight. What the numbers mean moves from the parameter to a state of
the layer at the first call.
"""

from __future__ import annotations

import torch

from splice.base.backends.backend import OWN, WEIGHT, Backend, Foreign, Place, Stored, is_of, library_of, values_in

_STATE = Place(OWN, "state")
# A row's largest absolute value is stored as this number.
_LARGEST = 127.0


def _owns(layer: type, weight: type) -> bool:
    return is_of(layer, "bitsandbytes", "Linear8bitLt", "Embedding8bit") and is_of(weight, "bitsandbytes", "Int8Params")


def _dense(layer: Foreign) -> torch.Tensor:
    weight = layer._parameters["weight"]
    data = values_in(weight)
    if data.is_floating_point():  # kept in half precision, or not moved yet to where it is to be used
        return data.clone()
    rows: torch.Tensor = weight.SCB if weight.SCB is not None else layer.state.SCB
    return data.float() * (rows.float().unsqueeze(1) / _LARGEST)


def _encode(layer: Foreign, dense: torch.Tensor) -> Stored:
    weight = layer._parameters["weight"]
    make = type(weight)
    was = layer.state
    state = library_of(weight, "bitsandbytes").MatmulLtState()
    state.threshold, state.has_fp16_weights, state.use_pool = was.threshold, was.has_fp16_weights, was.use_pool
    data = values_in(weight)
    if data.is_floating_point():
        same = make(dense.to(data.dtype), requires_grad=weight.requires_grad, has_fp16_weights=weight.has_fp16_weights)
        return {WEIGHT: same, _STATE: state}
    # On the CPU, or it would not quantise when it is moved.
    new = make(dense.to("cpu"), requires_grad=False, has_fp16_weights=False).to(data.device)
    return {WEIGHT: new, _STATE: state}


def _describe(layer: Foreign) -> str:
    return "8 bit"


BACKEND = Backend(
    name="bnb 8bit",
    owns=_owns,
    is_linear=False,
    dense=_dense,
    describe=_describe,
    encode=_encode,
    places=(WEIGHT, _STATE),
)
