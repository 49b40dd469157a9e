"""Tensors that are divided among processes: the whole of one, and this process's part of a whole.

torch calls them DTensors. FSDP2 divides what it manages and makes it whole around each call; tensor parallelism leaves the
tensors divided and lets each process compute with its part. What gathers is a collective: every process of the group has to
come by, in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor, Shard

# Where torch has the classes and functions used here. They are looked up among the modules that are there: an import takes a
# second, and while nobody else has imported them no tensor of these classes exists.
_TENSOR = "torch.distributed.tensor"
_FSDP = "torch.distributed.fsdp"


class Part(NamedTuple):
    """The box of a whole tensor that one process has."""

    # Where it begins in each dimension.
    offset: tuple[int, ...]
    # How far it goes; a 0 where the process has nothing.
    shape: tuple[int, ...]


def is_divided(tensor: torch.Tensor | None) -> TypeGuard[DTensor]:
    """Whether this process has a part of `tensor` alone."""
    module = sys.modules.get(_TENSOR)
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself, or all of one that is divided: then it is gathered from all processes."""
    # In no graph: a parameter is gathered for its values alone.
    return cast("DTensor", tensor.detach()).full_tensor() if is_divided(tensor) else tensor


def divided_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`values`, which every process has, in the form of `like`: whole, or divided in the same way."""
    if not is_divided(like):
        return whole(values)
    if is_divided(values):
        if values.device_mesh == like.device_mesh and values.placements == like.placements:
            return values
        values = whole(values)
    values = values.to(like.device)
    # Nothing is sent: each process takes its part of the values that it has itself.
    divided: torch.Tensor = sys.modules[_TENSOR].distribute_tensor(
        values, like.device_mesh, like.placements, src_data_rank=None
    )
    return divided


def part_of(like: torch.Tensor) -> Part | None:
    """The box of the whole that is this process's part of `like`; None of what is whole, or divided in another way."""
    if not is_divided(like):
        return None
    # Plain shards and copies alone. Others (strided ones, sums to be) are no box, or would have to be added up.
    if any(not placement.is_replicate() and type(placement).__name__ != "Shard" for placement in like.placements):
        return None
    offset, shape = [0] * like.dim(), list(like.shape)
    coordinate = like.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    # By hand, as torch divides: the first pieces are full, and the last ones get what is left.
    for index, placement in enumerate(like.placements):
        if placement.is_replicate():
            continue
        dim = cast("Shard", placement).dim % like.dim()
        count, size = like.device_mesh.size(index), shape[dim]
        piece = -(-size // count)
        begin = min(piece * coordinate[index], size)
        offset[dim] += begin
        shape[dim] = min(piece, size - begin)
    return Part(tuple(offset), tuple(shape)) if tuple(shape) == tuple(like.to_local().shape) else None


def part_in(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """That part of a whole tensor, in memory of its own."""
    for dim, (begin, length) in enumerate(zip(part.offset, part.shape)):
        tensor = tensor.narrow(dim, begin, length)
    return tensor.clone(memory_format=torch.contiguous_format)


def from_part(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The divided tensor of which this process has `part`, of the form of `like`."""
    assert is_divided(like)
    moved = part if like.is_meta else part.to(like.device)
    made: torch.Tensor = sys.modules[_TENSOR].DTensor.from_local(
        moved, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of `tensor`, in its graph."""
    return tensor.to_local() if is_divided(tensor) else tensor


def mesh_group(tensor: torch.Tensor) -> ProcessGroup:
    """The processes among which `tensor` is divided, in the one dimension of their mesh."""
    return cast("DTensor", tensor).device_mesh.get_group()


def is_tensor_parallel(layer: nn.Module) -> bool:
    """Whether each process computes with its part of the tensors of `layer`, and nobody makes them whole for a call."""
    # A divided parameter is of the class of divided tensors. Loads ask this of every target.
    divided = [t for t in layer._parameters.values() if type(t) is not nn.Parameter and is_divided(t)]
    # What FSDP manages is whole in a call, unless it manages what tensor parallelism has divided before.
    return bool(divided) and (
        not is_managed(layer) or any("tp" in (t.device_mesh.mesh_dim_names or ()) for t in divided)
    )


def divided_dim(layer: nn.Module) -> int | None:
    """The one dimension in which tensor parallelism divides the weight of `layer`; None where it does in another way."""
    weight = layer._parameters.get("weight")
    return None if weight is None or is_managed(layer) else sharded_dim(weight)


def sharded_dim(tensor: torch.Tensor) -> int | None:
    """The one dimension in which `tensor` is divided; None of what is whole, or divided in another way."""
    if not is_divided(tensor) or tensor.device_mesh.ndim != 1:
        return None
    (placement,) = tensor.placements
    # By name: derived classes divide in stripes.
    return cast("Shard", placement).dim % tensor.dim() if type(placement).__name__ == "Shard" else None


def empty_divided(layer: nn.Module, shape: Sequence[int], dim: int | None) -> DTensor:
    """A tensor without values on the mesh that the weight of `layer` is on: divided in `dim`, or copies for None."""
    module = sys.modules[_TENSOR]
    mesh = cast("DTensor", layer._parameters["weight"]).device_mesh
    kinds = [module.Replicate() if dim is None else module.Shard(dim)] * mesh.ndim
    empty: DTensor = module.distribute_tensor(torch.empty(tuple(shape), device="meta"), mesh, kinds, src_data_rank=None)
    return empty


def divided_by_first(values: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
    """`values` of the first process, divided among all as `template` is: others may have drawn other numbers."""
    like = cast("DTensor", template)
    divided: torch.Tensor = sys.modules[_TENSOR].distribute_tensor(values, like.device_mesh, like.placements)
    return divided


@contextmanager
def whole_tensors(places: Iterable[tuple[dict[str, Any], str]]) -> Iterator[None]:
    """Inside, the divided tensors that are registered in these places are whole, for code that reads them there."""
    divided = [(registry, name, registry[name]) for registry, name in places if is_divided(registry.get(name))]
    try:
        for registry, name, tensor in divided:
            gathered = whole(tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            registry[name] = nn.Parameter(gathered, requires_grad=False) if is_parameter else gathered
        yield
    finally:
        for registry, name, tensor in divided:
            registry[name] = tensor


def divide_again(network: nn.Module | None) -> None:
    """Let FSDP take back what it made whole for the last call, so that what is registered is what it keeps.

    What is written to a whole tensor, flags included, is gone with it.
    """
    if not is_sharded(network):
        return
    assert network is not None
    for module in network.modules():
        parameters = [p for p in module._parameters.values() if p is not None]
        # By the hook that it puts on each module whose tensors it has, for `state_dict`: the unit that the module belongs to
        # may be one above the network, which nobody knows here.
        if is_managed(module) and parameters and not all(map(is_divided, parameters)):
            for hook in module._state_dict_pre_hooks.values():
                hook(module, "", False)


def is_sharded(network: nn.Module | None) -> bool:
    """Whether FSDP2 divides `network`, or a part of it."""
    if network is None or _FSDP not in sys.modules or not torch.distributed.is_initialized():
        return False
    return any(map(is_managed, network.modules()))


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP2 divides the tensors of `module`: those that come later it does not know."""
    # Its own mark, which stays while the tensors are whole for a call.
    return "_is_fsdp_managed_module" in vars(module)
