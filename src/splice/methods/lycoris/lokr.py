"""LoKr: the update of a weight is the Kronecker product of a small matrix and a larger one, either of low rank if it pays.

Yeh et al., arXiv 2309.14859, section 4.2. With out = l k, in = m n and s = alpha / r: `ΔW = s * W1 ⊗ W2`, W1 (l, m) and
W2 (k, n), which for a convolution also has the kernel's axes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import nn

from splice.base.layers import LayerKind
from splice.checkpoint.types import PeftType
from splice.kinds.as_one import Alike
from splice.kinds.casting import cast_to
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.lycoris.layers import LycorisFields, LycorisLayer, check, core_shape, draw, product, rank_of, sizes
from splice.methods.targeted import Targeted


@dataclass
class LoKrConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.LOKR
    # Beside a regular expression as `target_modules`, `layers_to_transform` is no error here; it has no effect.
    index_needs_names: ClassVar[bool] = False
    pattern_fields = MappingProxyType({"rank_pattern": "r", "alpha_pattern": "alpha"})

    # Ranks of single layers: a regular expression for the end of a path -> its r. The first that matches counts.
    rank_pattern: dict[str, int] = field(default_factory=dict)
    # The same for alpha.
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    # Rank r of W2, and of W1 with `decompose_both`, at least 1. A factor that is small anyway is one whole matrix.
    r: int = 8
    # alpha, the numerator of the scale: s = alpha / r.
    alpha: int = 8
    # Probability with which a row of the update (an output of the layer) is left out in training, 0 to 1.
    rank_dropout: float = 0.0
    # Probability with which a layer's whole update is left out of a call in training, 0 to 1.
    module_dropout: float = 0.0
    # Whether the factors of W2, for a convolution with a kernel larger than 1, are joined by a core (r, r, *kernel);
    # otherwise the kernel's axes lie in one of them.
    use_effective_conv2d: bool = False
    # Whether W1 is a product of rank r too, where r is less than half its longer side.
    decompose_both: bool = False
    # How `out` and `in` are split in two: by this number where it divides them, else as equally as possible with the
    # smaller part at most this. -1 sets no limit.
    decompose_factor: int = -1
    # Whether the rows that `rank_dropout` leaves are scaled up, to make up for the others.
    rank_dropout_scale: bool = False
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # What starts at zero, so that nothing changes at first: W1 (True) or W2 ("lycoris"). False: all is random.
    init_weights: bool | Literal["lycoris"] = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None

    def computed(self) -> dict[str, object]:
        # No tensor tells the rank of a layer whose factors are small enough to be stored whole.
        return {"r": self.r, "alpha": self.alpha}


def split(dimension: int, factor: int = -1) -> tuple[int, int]:
    """`dimension` as a product of two numbers: by `factor` if it divides, else as close to each other as `factor` allows."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    small, large = 1, dimension
    for divisor in range(2, dimension + 1):
        if dimension % divisor:
            continue
        # Measured against the first pair, not the best one so far: the shapes of checkpoints follow from this rule.
        if small >= large or divisor > limit or divisor + dimension // divisor > 1 + dimension:
            break
        small, large = divisor, dimension // divisor
    return min(small, large), max(small, large)


class LoKrLayer(Alike, LycorisLayer):
    """LoKr on a linear layer or a convolution. Which factors there are follows from the sizes."""

    @classmethod
    def slots(cls, base: nn.Module, config: LoKrConfig, path: str) -> dict[str, Slot]:
        (size_in, size_out, kernel), r = sizes(base), rank_of(config, path)
        (rows1, rows2), (cols1, cols2) = (split(size, config.decompose_factor) for size in (size_out, size_in))
        core = core_shape(config, r, kernel)
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (rows1, cols1)}
        if config.decompose_both and r < max(rows1, cols1) / 2:
            shapes = {"lokr_w1_a": (rows1, r), "lokr_w1_b": (r, cols1)}
        if r >= max(rows2, cols2) / 2:
            shapes |= {"lokr_w2": (rows2, cols2, *kernel)}
        elif core:
            shapes |= {"lokr_w2_a": (r, rows2), "lokr_w2_b": (r, cols2), "lokr_t2": core}
        else:
            shapes |= {"lokr_w2_a": (rows2, r), "lokr_w2_b": (r, cols2 * math.prod(kernel))}
        return {suffix: Slot(shape) for suffix, shape in shapes.items()}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoKrConfig) -> None:
        zero = ("lokr_w2", "lokr_w2_b") if config.init_weights == "lycoris" else ("lokr_w1", "lokr_w1_a")
        draw(tensors, zero if config.init_weights else ())

    def prepare(self, base: nn.Module, config: LycorisFields, path: str) -> None:
        assert isinstance(config, LoKrConfig)
        super().prepare(base, config, path)
        self.dropout_keeps_mean = config.rank_dropout_scale

    def update(self) -> torch.Tensor:
        left, right = self._factor("lokr_w1"), self._factor("lokr_w2", self.find("lokr_t2"))
        if right.dim() == 4:
            left = left[:, :, None, None]
        # `right` of a one-dimensional convolution may have three axes: `kron` then lines up the two axes of `left` with
        # its last two, and the result is no Kronecker product of the weight. The reference trains exactly that.
        return torch.kron(left, right.contiguous()).reshape(self.shape)

    def likeness(self) -> Hashable:
        return None if len(self.shape) > 2 or isinstance(self.scale, torch.Tensor) else self.scale

    def applied(self, x: torch.Tensor) -> torch.Tensor | None:
        # (W1 ⊗ W2) x is W1 X W2^T, with x (in) = (m n) as a matrix X (m, n). At any number of rows it is faster than to make
        # the whole update and to multiply with that: 3 to 100 times, on layers of 512 to 2048 features.
        left, right = self._factor("lokr_w1"), self._factor("lokr_w2")
        inputs = torch.mm(cast_to(x, left).reshape(-1, right.shape[1]), right.t())
        # Not by `@`: which products that takes depends on whether there are gradients, and so do the last bits.
        columns = inputs.view(len(x), left.shape[1], len(right)).transpose(1, 2)
        outputs = torch.mm(columns.reshape(-1, left.shape[1]), left.t()).view(len(x), len(right), len(left))
        return outputs.transpose(1, 2).flatten(1)

    def _factor(self, name: str, core: torch.Tensor | None = None) -> torch.Tensor:
        whole = self.find(name)
        return product(self.tensor(name + "_a"), self.tensor(name + "_b"), core) if whole is None else whole


METHOD = register(
    Method(
        name=PeftType.LOKR,
        summary="Adds to a weight the Kronecker product of a small matrix and a larger one, which may be of low rank.",
        config=LoKrConfig,
        prefix="lokr_",
        tensor_names=frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
        layers=MappingProxyType(
            {LayerKind.LINEAR: LoKrLayer, LayerKind.CONV1D: LoKrLayer, LayerKind.CONV2D: LoKrLayer}
        ),
        containers=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        layer_views=MappingProxyType({"rank_dropout_scale": lambda layer: layer.config.rank_dropout_scale}),
        default_targets=LORA_TARGETS,
        check=check,
        names=MappingProxyType({"factorization": split}),
        paper="arXiv 2309.14859",
    )
)
