"""Tensors of a layer that stand in files, brought when somebody needs them at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import nn

from splice.checkpoint.tensors import SafetensorsFile


class FromFiles(MutableMapping[str, torch.Tensor]):
    """The tensors of one layer by name: of the files, or what has come to the layer since; and the hook that brings them."""

    offload_buffers = False
    execution_device = torch.device("cpu")

    def __init__(self, files: Mapping[str, tuple[SafetensorsFile, str]]) -> None:
        # Name on the layer -> the file that has it, and its name there.
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
        if name in self.own:
            return self.own[name]
        file, key = self.files[name]
        return file.read([key])[0]

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
