"""Tensors that are kept elsewhere between calls, in memory or on disk: bringing them, and changing them there.

A module whose tensors are kept elsewhere has a hook, and has them on the meta device except while it is called. The hook is
accelerate's, or stands under `KEPT`. It looks them up in a map, often of the whole model, which reads from a dict, from
files that accelerate wrote, or from a checkpoint.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

# Where a module has the hook of something else than accelerate that keeps its tensors elsewhere.
KEPT = "splice_kept_elsewhere"


class OffloadingHook(Protocol):
    """What brings the weights of a module that are kept elsewhere between calls: accelerate's hook, or one under `KEPT`."""

    # Where the module computes; None where nobody says.
    execution_device: int | str | torch.device | None
    # Where they are, by their names in the module.
    weights_map: Mapping[str, torch.Tensor]
    # The devices that they had before, by their names.
    original_devices: dict[str, torch.device]
    # Whether buffers are kept there too.
    offload_buffers: bool

    def pre_forward(self, module: nn.Module) -> object:
        """Bring the weights where the module computes."""
        ...

    def post_forward(self, module: nn.Module, output: object) -> object:
        """Take them away again."""
        ...


def execution_device(layer: nn.Module) -> torch.device | None:
    """Where accelerate's hook on `layer` computes; None without a hook, or where the hook does not say."""
    # The weights cannot tell: between calls an offloaded layer has them on `meta`.
    # Other hooks have no device. By name: accelerate may not be installed.
    aligning = [h for h in _hooks(layer) if any(cls.__name__ == "AlignDevicesHook" for cls in type(h).__mro__)]
    for hook in (*aligning, *_kept(layer)):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return None


def _kept(module: nn.Module) -> list[OffloadingHook]:
    hook: OffloadingHook | None = module.__dict__.get(KEPT)
    return [] if hook is None else [hook]


def _hooks(module: nn.Module) -> list[Any]:
    hook: Any = module.__dict__.get("_hf_hook")
    if hook is None:
        return []
    return list(hook.hooks) if type(hook).__name__ == "SequentialHook" else [hook]


def offloading_hooks(module: nn.Module) -> list[OffloadingHook]:
    """The hooks that bring the weights of `module`; none where they are in the module."""
    own = _kept(module)
    return own or [hook for hook in _hooks(module) if type(hook).__name__ == "AlignDevicesHook" and hook.offload]


def is_offloaded(module: nn.Module) -> bool:
    """Whether the tensors of `module` itself are kept elsewhere between calls."""
    return bool(offloading_hooks(module))


@contextmanager
def at_hand(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the tensors of these modules are where they compute, to be read; changes are lost."""
    hooked = [(module, hook) for module in modules for hook in offloading_hooks(module)]
    came: list[tuple[nn.Module, OffloadingHook]] = []
    try:
        for module, hook in hooked:
            came.append((module, hook))
            hook.pre_forward(module)
        yield
    finally:
        for module, hook in came:
            hook.post_forward(module, None)


class Shelf(NamedTuple):
    """Where the hook of a module keeps one of its tensors."""

    # What holds it.
    map: MutableMapping[str, Any]
    # Its name there.
    name: str
    # The folder that accelerate writes to; empty where it is kept in memory, or read from a checkpoint.
    folder: str
    # Whether it is in memory.
    in_memory: bool
    # Adds a name to those that are known, of a map that lists them; None of one that does not.
    list_name: Callable[[str], None] | None = None

    @property
    def entry(self) -> Any:
        """What the map has for it: the tensor, or where it lies on disk; None for nothing."""
        return self.map.get(self.name)

    def put(self, entry: Any) -> None:
        """Let the map have this for it; nothing, for None."""
        if entry is None:
            self.map.pop(self.name, None)
        else:
            self.map[self.name] = entry

    def read(self, entry: Any) -> torch.Tensor:
        """The tensor of an entry; of a file on disk as much as is used of it."""
        if isinstance(entry, torch.Tensor):
            return entry
        dtype, shape = getattr(torch, entry["dtype"]), tuple(entry["shape"])
        if entry.get("safetensors_file") is None:
            path = os.path.join(self.folder, f"{self.name}.dat")
            return torch.from_file(path, shared=False, size=math.prod(shape), dtype=dtype).view(shape)
        with safe_open(entry["safetensors_file"], framework="pt") as file:
            return cast(torch.Tensor, file.get_tensor(entry.get("weight_name", self.name))).to(dtype)

    def written(self, tensor: torch.Tensor) -> Any:
        """An entry for `tensor`, kept as the one that is there: in memory, or in a file of its own."""
        tensor = tensor.detach().to("cpu")
        if self.in_memory:
            return tensor
        # Not over the old file, which may be a checkpoint's own, and is what unmerging goes back to.
        handle, path = tempfile.mkstemp(".safetensors", f"{self.name[-100:]}-merged-", self.folder or None)
        os.close(handle)
        save_file({self.name: tensor.contiguous()}, path)
        dtype = str(tensor.dtype).removeprefix("torch.")
        fields = {"safetensors_file": path, "weight_name": self.name, "dtype": dtype, "shape": list(tensor.shape)}
        return _Written(fields)


class _Written(dict[str, object]):
    """An entry for a file that was written here, and is there as long as the entry is."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        super().__init__(fields)
        weakref.finalize(self, os.unlink, str(fields["safetensors_file"]))

    def __deepcopy__(self, memo: object) -> _Written:
        return self  # nobody changes it, and a copy would not keep the file


def shelf_of(module: nn.Module, name: str) -> Shelf | None:
    """Where the tensor of `module` called `name` is kept between calls; None where it stays in the module."""
    for hook in offloading_hooks(module):
        if name in module._parameters or hook.offload_buffers:
            return _shelf(hook.weights_map, name)
    return None


def _shelf(where: Any, name: str) -> Shelf:
    # By name: accelerate may not be installed. Maps of maps, the innermost for the whole model.
    while type(where).__name__ == "PrefixedDataset":
        where, name = where.dataset, where.prefix + name
    if type(where).__name__ != "OffloadedWeightsLoader":
        return Shelf(cast("MutableMapping[str, Any]", where), name, "", True)
    known = name in where.state_dict or name not in where.index
    if known:
        return Shelf(where.state_dict, name, "", True, where.all_keys.append)
    return Shelf(where.index, name, str(where.save_folder or ""), False)


def keep_elsewhere(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Let the hook of `module`, if it has one that offloads, know a tensor that has come to the module since."""
    for hook in offloading_hooks(module):
        if name not in module._parameters and not hook.offload_buffers:
            continue
        shelf = _shelf(hook.weights_map, name)
        if shelf.entry is None and shelf.list_name is not None:
            shelf.list_name(shelf.name)
        shelf.put(tensor.detach())
        hook.original_devices[name] = tensor.device


def forget_elsewhere(module: nn.Module, name: str) -> None:
    """Let the hook of `module`, if it has one that offloads, forget a tensor that leaves the module."""
    for hook in offloading_hooks(module):
        shelf = _shelf(hook.weights_map, name)
        if shelf.entry is not None:
            shelf.put(None)
        hook.original_devices.pop(name, None)
