"""torchao: the parameter is a tensor of a class that holds codes and scales, in a layer of torch.

The layer does not show it, and the tensor tells the shape and dtype of what it stands for: only its class says what it is.
"""

from __future__ import annotations

import torch

from splice.base.backends.backend import WEIGHT, Backend, Foreign, Stored, is_of, library_of

# Classes whose settings can be told from the tensor, so that another weight can be stored in the same way.
_WRITABLE = ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor")


def _owns(layer: type, weight: type) -> bool:
    return is_of(weight, "torchao")


def _tensor(layer: Foreign) -> Foreign:
    weight = layer._parameters["weight"]
    # Some wrap the tensor in a plain parameter.
    return weight if is_of(type(weight), "torchao") else weight.data


def _dense(layer: Foreign) -> torch.Tensor:
    tensor = _tensor(layer)
    wraps = is_of(type(tensor), "torchao", "LinearActivationQuantizedTensor")
    found = (tensor.original_weight_tensor if wraps else tensor).detach()
    is_nf4 = is_of(type(found), "torchao", "NF4Tensor")
    dense: torch.Tensor = found.get_original_weight() if is_nf4 else found.dequantize()
    return dense


def _kept(layer: Foreign) -> str:
    return type(_tensor(layer)).__name__


def _why_unwritable(layer: Foreign) -> str:
    called = _kept(layer)
    return "" if called in _WRITABLE else f"its weight is a {called}, which does not tell how it was made"


def _encode(layer: Foreign, dense: torch.Tensor) -> Stored:
    tensor = _tensor(layer)
    make = type(tensor)
    dense = dense.to(tensor.dtype)
    sizes = library_of(tensor, "torchao.quantization.granularity")
    mappings = library_of(tensor, "torchao.quantization.quant_primitives").MappingType
    if make.__name__ != "Float8Tensor":
        # Symmetric ones have zeros too, or none; some layers compute as if these were 0 in any case.
        is_symmetric = tensor.zero_point is None or not tensor.zero_point.any()
        mapping = mappings.SYMMETRIC if is_symmetric else mappings.ASYMMETRIC
    if make.__name__ == "IntxUnpackedToInt8Tensor":
        new = make.from_hp(
            dense,
            tensor.block_size,
            tensor.target_dtype,
            mapping_type=mapping,
            activation_quantization=tensor.activation_quantization,
        )
    elif make.__name__ == "Int8Tensor":
        new = make.from_hp(
            dense,
            sizes.PerBlock(tuple(tensor.block_size)),
            mapping_type=mapping,
            act_quant_kwargs=tensor.act_quant_kwargs,
            act_quant_scale=tensor.act_quant_scale,
            act_quant_zero_point=tensor.act_quant_zero_point,
            act_pre_scale=tensor.act_pre_scale,
            reduce_range=tensor.reduce_range,
        )
    else:
        new = make.from_hp(
            dense,
            float8_dtype=tensor.qdata.dtype,
            granularity=_granularity(tensor, sizes),
            mm_config=tensor.mm_config,
            kernel_preference=tensor.kernel_preference,
            act_quant_kwargs=tensor.act_quant_kwargs,
        )
    return {WEIGHT: torch.nn.Parameter(new, requires_grad=False)}


def _granularity(tensor: Foreign, sizes: Foreign) -> Foreign:
    """The name of its blocks: kernels are chosen by it."""
    size, whole = tuple(tensor.block_size), tuple(tensor.shape)
    if size == whole:
        return sizes.PerTensor()
    row = (*(1,) * (len(whole) - 1), whole[-1])
    return sizes.PerRow() if size == row else sizes.PerBlock(size)


def _describe(layer: Foreign) -> str:
    called = _kept(layer)
    tensor = _tensor(layer)
    bits = f" of {str(tensor.target_dtype).removeprefix('torch.')}" if called == "IntxUnpackedToInt8Tensor" else ""
    return called + bits


def _dtype(layer: Foreign) -> torch.dtype | None:
    found: torch.dtype = _tensor(layer).dtype
    return found


BACKEND = Backend(
    name="torchao",
    owns=_owns,
    is_linear=False,
    dense=_dense,
    describe=_describe,
    why_unwritable=_why_unwritable,
    encode=_encode,
    dtype=_dtype,
)
