"""The kinds of adapter layer beside `Additive`: a weight delta, a transform of the input, tensors that layers share.

A method says what its kind asks for (an update, a transform) and nothing of how it is applied, merged or composed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from splice.config import PeftConfig
from splice.kinds.layer import AdapterLayer


class SharedTensors(AdapterLayer):
    """Tensors that all layers of one adapter use, held once for the adapter and saved under names of their own.

    It stands on no layer: the layers of its adapter get it by `join`, and the tuner registers it.
    """

    # Whether the checkpoint holds them; otherwise `initialise` makes them again, bit for bit, from what the config says.
    stored: bool = True
    # Whether the reference's `state_dict` has them once more for every layer.
    repeated_on_layers: ClassVar[bool] = False

    @classmethod
    def shapes(cls, targets: Sequence[tuple[str, nn.Module]], config: Any) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, for these targets (path, base layer)."""
        raise NotImplementedError

    @classmethod
    def is_stored(cls, config: Any) -> bool:
        """Whether a checkpoint with this config holds them."""
        return True

    def prepare(self, base: nn.Module, config: PeftConfig, path: str) -> None:
        self.stored = self.is_stored(config)
        if not self.stored:
            self._non_persistent_buffers_set.update(self._buffers)

    def named_slots(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.stored:
            yield from super().named_slots()

    @classmethod
    def key(cls, path: str, suffix: str) -> str:
        return f"base_model.{suffix}"

    @classmethod
    def full_memory_name(cls, path: str, suffix: str, adapter_name: str) -> str:
        return f"base_model.{cls.memory_name(suffix, adapter_name)}"
