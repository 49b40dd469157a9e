"""Buffers by name, as `nn.ParameterDict` holds parameters."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import cast

import torch
from torch import nn


class BufferDict(nn.Module):
    """A dict of tensors that are buffers of the module.

    Args:
        buffers: what is in it at first.
        persistent: whether they are part of its state dict.
    """

    def __init__(self, buffers: Mapping[str, torch.Tensor] | None = None, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        self.update(buffers or {})

    @property
    def _held(self) -> dict[str, torch.Tensor]:
        return cast("dict[str, torch.Tensor]", self._buffers)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._held[key]

    def __setitem__(self, key: str, buffer: torch.Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]
        self._non_persistent_buffers_set.discard(key)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def clear(self) -> None:
        """Take all out."""
        for key in list(self):
            del self[key]

    def pop(self, key: str) -> torch.Tensor:
        """Take one out."""
        value = self[key]
        del self[key]
        return value

    def keys(self) -> KeysView[str]:
        """The names."""
        return self._held.keys()

    def items(self) -> ItemsView[str, torch.Tensor]:
        """The names, each with its tensor."""
        return self._held.items()

    def values(self) -> ValuesView[torch.Tensor]:
        """The tensors."""
        return self._held.values()

    def update(self, buffers: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Put these in, in their order."""
        for key, buffer in dict(buffers).items():
            self[key] = buffer
