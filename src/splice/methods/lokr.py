"""LoKr: the update of a weight is the Kronecker product of a small matrix and a larger one, either of low rank if it pays.

Yeh et al., arXiv 2309.14859, section 4.2. With out = l k, in = m n and s = alpha / r: `ΔW = s * W1 ⊗ W2`, W1 (l, m) and
W2 (k, n), which for a convolution also has the kernel's axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from splice.base.layers import LayerKind
from splice.checkpoint.types import PeftType
from splice.kinds.registry import Method, register
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.lycoris import LycorisLayer, check, core_shape, draw, product, rank_of, sizes
from splice.methods.targeted import TargetedConfig


@dataclass
class LoKrConfig(TargetedConfig):
    """Fields and defaults of the reference, in its order."""

    method: ClassVar[PeftType] = PeftType.LOKR
    index_needs_names: ClassVar[bool] = False
    pattern_fields = MappingProxyType({"rank_pattern": "r", "alpha_pattern": "alpha"})

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    init_weights: bool | Literal["lycoris"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None


def split(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product of two numbers: by `factor` if it divides, else as close to each other as `factor` allows."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small, large = 1, size
    for divisor in range(2, size + 1):
        if size % divisor:
            continue
        # Measured against the first pair, not the best one so far: the shapes of checkpoints follow from this rule.
        if small >= large or divisor > limit or divisor + size // divisor > 1 + size:
            break
        small, large = divisor, size // divisor
    return min(small, large), max(small, large)


class LoKrLayer(LycorisLayer):
    """LoKr on a linear layer or a convolution. Which factors there are follows from the sizes."""

    @classmethod
    def slots(cls, base: nn.Module, config: LoKrConfig, path: str) -> dict[str, tuple[int, ...]]:
        (size_in, size_out, kernel), r = sizes(base), rank_of(config, path)
        (rows1, rows2), (cols1, cols2) = (split(size, config.decompose_factor) for size in (size_out, size_in))
        core = core_shape(config, r, kernel)
        slots: dict[str, tuple[int, ...]] = {"lokr_w1": (rows1, cols1)}
        if config.decompose_both and r < max(rows1, cols1) / 2:
            slots = {"lokr_w1_a": (rows1, r), "lokr_w1_b": (r, cols1)}
        if r >= max(rows2, cols2) / 2:
            return {**slots, "lokr_w2": (rows2, cols2, *kernel)}
        if core:
            return {**slots, "lokr_w2_a": (r, rows2), "lokr_w2_b": (r, cols2), "lokr_t2": core}
        return {**slots, "lokr_w2_a": (rows2, r), "lokr_w2_b": (r, cols2 * math.prod(kernel))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoKrConfig) -> None:
        zero = ("lokr_w2", "lokr_w2_b") if config.init_weights == "lycoris" else ("lokr_w1", "lokr_w1_a")
        draw(tensors, zero if config.init_weights else ())

    def prepare(self, base: nn.Module, config: Any, path: str) -> None:
        super().prepare(base, config, path)
        self.dropout_keeps_mean = config.rank_dropout_scale

    def update(self) -> torch.Tensor:
        left, right = self._factor("lokr_w1"), self._factor("lokr_w2", self._parameters.get("lokr_t2"))
        if right.dim() == 4:
            left = left[:, :, None, None]
        # `right` of a one-dimensional convolution may have three axes: `kron` then lines up the two axes of `left` with
        # its last two, and the result is no Kronecker product of the weight. The reference trains exactly that.
        return torch.kron(left, right.contiguous()).reshape(self.shape)

    def _factor(self, name: str, core: torch.Tensor | None = None) -> torch.Tensor:
        whole = self._parameters.get(name)
        if whole is not None:
            return whole
        a, b = self._parameters[name + "_a"], self._parameters[name + "_b"]
        assert a is not None and b is not None
        return product(a, b, core)


METHOD = register(
    Method(
        name=PeftType.LOKR,
        config=LoKrConfig,
        prefix="lokr_",
        tensor_names=frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
        layers=MappingProxyType(
            {LayerKind.LINEAR: LoKrLayer, LayerKind.CONV1D: LoKrLayer, LayerKind.CONV2D: LoKrLayer}
        ),
        default_targets=LORA_TARGETS,
        check=check,
        paper="arXiv 2309.14859",
    )
)
