"""C3A: the update of a weight is made of blocks that are circulant matrices, each worked out from one trained vector.

Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", arXiv 2407.19342, section 3. Block (p, q) of the
update has `kernel[p, q, (j - i) mod b] / in` at (i, j), so its product with an input is a circular correlation: worked out
by Fourier transforms, without the blocks themselves.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from splice.base.layers import LayerKind, features
from splice.checkpoint.types import PeftType
from splice.kinds.additive import Additive
from splice.kinds.as_one import Alike
from splice.kinds.casting import cast_to
from splice.kinds.matching import value_behind_dot
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted, check_positive


@dataclass
class C3AConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.C3A
    pattern_fields = MappingProxyType({"block_size_pattern": "block_size"})

    # b, the side of a block: it divides the inputs and the outputs of each layer.
    block_size: int = 256
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Biases of the base to train with the adapter: "none", "all", or "c3a_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # b of single layers: a whole path, or a regular expression for what stands behind one of its dots -> b.
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    # How the kernels start: true for zero, so that nothing changes at first; "gaussian" for N(0, 1); "kaiming_uniform";
    # "xavier_uniform", for which false is another word.
    init_weights: bool | str | None = "xavier_uniform"


_INITS = (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")


def _check(config: C3AConfig) -> None:
    check_positive(block_size=config.block_size, **config.block_size_pattern)
    if config.init_weights not in _INITS:
        raise ValueError(f"Unknown init_weights: {config.init_weights!r}; it is one of {_INITS}.")


class C3ALayer(Alike, Additive):
    """C3A on a linear layer: the kernels, (out / b, in / b, b)."""

    numbers = MappingProxyType({"block_size": "block_size"})
    c3a_kernel = Held()

    @classmethod
    def slots(cls, base: nn.Module, config: C3AConfig, path: str) -> dict[str, Slot]:
        (size_in, size_out), block = (
            features(base),
            value_behind_dot(config.block_size_pattern, path, config.block_size),
        )
        check_positive(block_size=block)
        for size, what in ((size_in, "inputs"), (size_out, "outputs")):
            if size % block:
                raise ValueError(
                    f"{path}: the block size should be a factor of the layer's sizes, and {block} divides not its {size} "
                    f"{what}. Choose another `block_size`, or give this layer its own with `block_size_pattern`."
                )
        return {"c3a_kernel": Slot((size_out // block, size_in // block, block))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: C3AConfig) -> None:
        kernel, (size_in, size_out) = tensors["c3a_kernel"], features(base)
        if config.init_weights is True:
            nn.init.zeros_(kernel)
        elif config.init_weights == "gaussian":
            nn.init.normal_(kernel)
        else:
            of_inputs = config.init_weights == "kaiming_uniform"
            bound = math.sqrt(1 / size_in if of_inputs else 6 / (size_in + size_out))
            nn.init.uniform_(kernel, -bound, bound)

    def prepare(self, base: nn.Module, config: C3AConfig, path: str) -> None:
        self.block_size = value_behind_dot(config.block_size_pattern, path, config.block_size)
        self.size_in = features(base)[0]

    def likeness(self) -> Hashable:
        return None if isinstance(self.scale, torch.Tensor) else (self.scale, self.block_size)

    def kernel(self) -> torch.Tensor:
        """The kernels as they multiply inputs; half precision has no Fourier transform."""
        kernel = self.c3a_kernel
        return kernel.to(torch.promote_types(kernel.dtype, torch.float32)) / self.size_in

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.c3a_kernel)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.kernel()
        x = x.to(kernel.dtype)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._correlated(x, kernel)
        # The gradient that the reference gives an input is, in each block, that of the outputs in reverse. Trajectories of
        # training, and so what is resumed, depend on it; values, and the gradient of the kernels, do not.
        passed = self._correlated(x, kernel.detach(), reverse=True)
        return self._correlated(x.detach(), kernel) + (passed - passed.detach())

    def _correlated(self, x: torch.Tensor, kernel: torch.Tensor, reverse: bool = False) -> torch.Tensor:
        """The update for `x` (..., in); with `reverse` number i of each block stands at -i, counted around."""
        # (..., in / b, frequencies) and (out / b, in / b, frequencies): real numbers need half of the frequencies alone.
        inputs = torch.fft.rfft(x.reshape(*x.shape[:-1], kernel.shape[1], self.block_size))
        products = torch.einsum("...qf,pqf->...pf", inputs, torch.fft.rfft(kernel).conj())
        update: torch.Tensor = torch.fft.irfft(products.conj() if reverse else products, n=self.block_size)
        return update.flatten(-2)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        kernel, b = self.kernel(), self.block_size
        places = torch.arange(b, device=kernel.device)
        blocks = kernel[:, :, (places[None, :] - places[:, None]) % b]  # (out / b, in / b, b, b)
        return blocks.transpose(1, 2).reshape(kernel.shape[0] * b, kernel.shape[1] * b)


METHOD = register(
    Method(
        name=PeftType.C3A,
        summary="Adds to a weight blocks that are circulant matrices, each worked out from one trained vector.",
        config=C3AConfig,
        prefix="c3a_",
        tensor_names=frozenset({"c3a_kernel"}),
        layers=MappingProxyType({LayerKind.LINEAR: C3ALayer}),
        default_targets=MappingProxyType({**LORA_TARGETS, "gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}),
        check=_check,
        names=MappingProxyType({"C3ALinear": C3ALayer}),
        paper="arXiv 2407.19342",
    )
)
