"""The kinds of adapter layer beside `Additive`: a weight delta, a transform of the input, tensors that layers share.

A method says what its kind asks for (an update, a transform) and nothing of how it is applied, merged or composed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import LayerKind, kind_of
from splice.config import PeftConfig
from splice.kinds.layer import AdapterLayer, Additive, Forward, cast_to

_CONVOLUTIONS = {LayerKind.CONV1D: F.conv1d, LayerKind.CONV2D: F.conv2d, LayerKind.CONV3D: F.conv3d}


def operation_of(base: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What `base` computes of its input and a weight, (out, in) if it is linear; without bias."""
    kind = kind_of(base)
    if kind in (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR):
        return F.linear
    if kind is LayerKind.EMBEDDING:
        return partial(F.embedding, padding_idx=base.padding_idx)
    assert kind is not None
    return partial(
        _CONVOLUTIONS[kind], stride=base.stride, padding=base.padding, dilation=base.dilation, groups=base.groups
    )


class WeightDelta(Additive):
    """The kind `y + op(x, scale * update)`, where `op` is the base layer's own operation without its bias."""

    def prepare(self, base: nn.Module, config: Any, path: str) -> None:
        self.operation = operation_of(base)
        # The operation pads with zeros; where the base does not, the update is no change of its weight.
        self.mergeable = vars(base).get("padding_mode", "zeros") == "zeros"
        weight = base._parameters["weight"]
        assert weight is not None
        linear = kind_of(base) is LayerKind.TRANSPOSED_LINEAR
        self.shape = tuple(weight.shape[::-1] if linear else weight.shape)

    def update(self) -> torch.Tensor:
        """The unscaled update in the shape of the dense weight, (out, in) or (out, in / groups, *kernel)."""
        raise NotImplementedError

    def dropped(self, update: torch.Tensor) -> torch.Tensor:
        """`update` as it is used in training, where a method drops parts of it."""
        return update

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        update = self.dropped(self.update()) if self.training else self.update()
        return self.operation(cast_to(x, update), update)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        return self.scale * self.update()

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return x  # `delta` casts it, once it has the update


class InputTransform(AdapterLayer):
    """The kind `base(transform(x))`. Of several, the first active one is the first that the input meets."""

    mergeable = True
    keeps_input = False
    first_outside: ClassVar[bool] = True

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """The input that the base layer gets, of the shape and dtype of `x`."""
        raise NotImplementedError

    def around(self, x: torch.Tensor, inner: Forward) -> Any:
        return inner(self.transform(x))


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
