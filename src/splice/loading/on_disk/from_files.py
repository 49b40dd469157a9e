"""Tensors of a layer that stand in files, brought when somebody needs them at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from splice.checkpoint.header import Entry
from splice.errors import CheckpointError

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def read_tensor(path: Path, entry: Entry) -> torch.Tensor:
    """The values of a tensor in a file of safetensors, in memory of their own.

    Raises:
        CheckpointError: the file has become shorter since its header was read.
    """
    # Not a map of the file: its pages would stay in memory beside the result.
    values = torch.empty(entry.size, dtype=torch.uint8)
    if entry.size:
        view, done = _view(values), 0
        with open(path, "rb", buffering=0) as file:
            file.seek(entry.offset)
            while done < entry.size:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{path} ends before its tensors do: it has been changed meanwhile")
                done += count
    return values.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as files hold them."""
    flat = tensor.detach().contiguous().view(-1)
    return _view(flat.view(torch.uint8)) if flat.numel() else memoryview(b"")


def _view(values: torch.Tensor) -> memoryview:
    # numpy's arrays are buffers, which older stubs of numpy do not say.
    return memoryview(cast(bytes, values.numpy()))


class FromFiles(MutableMapping[str, torch.Tensor]):
    """The tensors of one layer by name: of the files, or what has come to the layer since; and the hook that brings them."""

    offload_buffers = False
    execution_device = torch.device("cpu")

    def __init__(self, files: Mapping[str, tuple[Path, Entry]]) -> None:
        self.files = dict(files)
        # What has come since.
        self.own: dict[str, torch.Tensor] = {}
        # Parameters whose places are taken while the tensors are at hand.
        self.aside: dict[str, nn.Parameter] = {}
        self.original_devices = dict.fromkeys(files, self.execution_device)

    @property
    def weights_map(self) -> FromFiles:
        """Itself: it is both the hook and the map that the hook reads."""
        return self

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.own[name] if name in self.own else read_tensor(*self.files[name])

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self.own[name] = tensor

    def __delitem__(self, name: str) -> None:
        if self.own.pop(name, None) is None:
            del self.files[name]

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self.files  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.files, *self.own]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def pre_forward(self, module: nn.Module) -> None:
        """Put the tensors into their places in `module`."""
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and name in self:
                self.aside[name] = parameter
                module._parameters[name] = nn.Parameter(self[name].to(parameter.dtype), requires_grad=False)

    def post_forward(self, module: nn.Module, output: object) -> object:
        """Give back the parameters that stood there before: those that tell which tensors are tied."""
        for name, parameter in self.aside.items():
            module._parameters[name] = parameter
        self.aside.clear()
        return output

    def __deepcopy__(self, memo: object) -> FromFiles:
        return FromFiles(self.files)


def sync(path: Path) -> None:
    """Return once a file or a folder is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
