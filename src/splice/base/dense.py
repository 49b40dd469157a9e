"""Access to a base weight that is stored as an ordinary tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from splice.base.backends.finding import backend_of
from splice.base.bare import bare_children
from splice.base.layers import LayerKind, kind_of
from splice.base.offload import execution_device
from splice.base.sharding import divided_like


def device_of(layer: nn.Module) -> torch.device:
    """Where the computation of `layer` happens: the device for what is put on it.

    A layer whose weights accelerate keeps elsewhere (on `meta` between calls) computes on its hook's device.
    """
    hooked = execution_device(layer)
    if hooked is not None:
        return hooked
    # The weight before all others: it is what the layer computes with.
    weight = layer._parameters.get("weight")
    tensor = weight if weight is not None else next(_own_tensors(layer), None)
    if tensor is None:
        return torch.device("cpu")
    if not tensor.is_meta:
        return tensor.device
    # A network whose parts are offloaded has no hook of its own that says where: the first of its parts does.
    below = (execution_device(module) for module in layer.modules())
    return next((device for device in below if device is not None), tensor.device)


def dtype_of(layer: nn.Module) -> torch.dtype:
    """The floating dtype `layer` computes in; float32 where its weight is stored as integers and nothing says more."""
    # `_parameters` and not `layer.weight`: while an adapter shows a tensor in its place, that is what the attribute reads.
    weight = layer._parameters.get("weight")
    if weight is not None and weight.is_floating_point():
        return weight.dtype
    backend = backend_of(layer)
    if backend is not None:
        # Of one without a parameter of this name nothing is asked: the reference holds adapters beside it in float32.
        return (None if weight is None else backend.dtype(layer)) or torch.float32
    for tensor in _own_tensors(layer):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def in_linear_layout(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight as stored by `layer` as (out, in), or the other way round: it is its own inverse."""
    return weight.T if kind_of(layer) is LayerKind.TRANSPOSED_LINEAR else weight


def added(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """A new tensor `weight + delta`, summed in the wider dtype and rounded once to the dtype of `weight`."""
    # The other order, the delta cast down and then added, rounds twice.
    wide, weight = torch.promote_types(weight.dtype, delta.dtype), weight.detach()
    if not _goes_by_rows(weight, delta):
        return (weight.to(wide) + delta.to(device=weight.device, dtype=wide)).to(weight.dtype)
    # A few rows after the other: whole copies of both in the wider dtype take most of the time and of the memory of a merge.
    result = torch.empty_like(weight)
    count = max(1, AT_ONCE // max(1, weight[0].numel()))
    for begin in range(0, len(weight), count):
        rows = slice(begin, begin + count)
        result[rows] = weight[rows].to(wide) + delta[rows]
    return result


# Numbers that are summed at once: so few that they stay in the processor's cache.
AT_ONCE = 1 << 18


def _goes_by_rows(weight: torch.Tensor, delta: torch.Tensor) -> bool:
    alike = weight.dtype is delta.dtype
    return (
        not alike
        and _is_large(weight)
        and is_plain_tensor(delta)
        and weight.shape == delta.shape
        and not delta.requires_grad
    )


def _is_large(weight: torch.Tensor) -> bool:
    return is_plain_tensor(weight) and weight.numel() > AT_ONCE and weight.is_contiguous()


def is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Whether it is an ordinary tensor on the CPU: not divided among processes, nor stored in codes."""
    return type(tensor) is torch.Tensor and tensor.device.type == "cpu"


def as_now(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` on the device and in the dtype of `like`: itself, where they agree."""
    return tensor.to(device=like.device, dtype=like.dtype)


@torch.inference_mode(False)
@torch.no_grad()
def exchange(parameter: nn.Parameter, values: torch.Tensor) -> torch.Tensor:
    """Give `parameter` these values, and hand back those that it had; whoever holds the object sees the new ones.

    `values` belong to the parameter from then on.
    """
    # Not in inference mode: values made there would make the parameter one that cannot be trained any more.
    if values.is_inference() and not parameter.is_inference():
        values = values.clone()
    if is_traceable_wrapper_subclass(parameter):
        # Sharded tensors and their like hold others: `.data` would exchange the shell alone.
        before = parameter.detach().clone()
        parameter.copy_(divided_like(values, parameter))
        return before
    # Not `copy_`: it needs the memory of a third tensor for what it writes over.
    before = parameter.data
    parameter.data = values
    if not parameter.is_inference():
        # A backward that began before must not go on with the new values: torch refuses it by this number.
        torch.autograd.graph.increment_version(parameter)
    return before


def values_of(parameter: nn.Parameter) -> torch.Tensor:
    """What `exchange` would hand back now."""
    return parameter.detach().clone() if is_traceable_wrapper_subclass(parameter) else parameter.data


def _own_tensors(layer: nn.Module) -> Iterator[torch.Tensor]:
    yield from (p for p in layer._parameters.values() if p is not None)
    yield from (b for b in layer._buffers.values() if b is not None)
    for _, child in bare_children(layer):
        yield from child.parameters()
