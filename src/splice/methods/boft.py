"""BOFT: the input of a layer is rotated by a product of sparse rotations, as the butterflies of a Fourier transform.

Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", arXiv 2311.06243, section 4. Factor i of
m is block-diagonal but for a permutation P_i, with blocks of s that are rotations: `B_i = P_i O_i P_i^T`, and each block the
Cayley transform of a skew-symmetric matrix. With R = B_(m-1) ... B_0 and a trained factor c for each output: `W' = c W R^T`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from splice.base.layers import LayerKind, features
from splice.base.weight_access import bias_of
from splice.checkpoint.types import PeftType
from splice.config import copy_config
from splice.kinds.as_one import Alike
from splice.kinds.casting import check_values
from splice.kinds.input_transform import InputTransform
from splice.kinds.layer import AdapterLayer
from splice.kinds.original import scaled_bias, tensor_in_use
from splice.kinds.output_transform import OutputTransform
from splice.kinds.reading import Checkpoint, Reading
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held, gets_gradients
from splice.kinds.weight_transform import WeightTransform
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.rotations import cayley, each_block, flat_inputs, in_blocks, in_rows, is_few, turned
from splice.methods.targeted import Targeted, check_positive


@dataclass
class BOFTConfig(Targeted):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: both `boft_block_size` and `boft_block_num` are given (not 0), or neither is.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.BOFT
    # Beside a regular expression as `target_modules`, `layers_to_transform` is no error here; it has no effect.
    index_needs_names: ClassVar[bool] = False

    # s, the side of a block: it divides the inputs of each layer. 0 where `boft_block_num` is given.
    boft_block_size: int = 4
    # The number of blocks of a factor: it divides the inputs of each layer. 0 where `boft_block_size` is given.
    boft_block_num: int = 0
    # m, the number of factors; with one there is no permutation, only blocks.
    boft_n_butterfly_factor: int = 1
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # The share of the blocks of one factor that rotate nothing in a call in training.
    boft_dropout: float = 0.0
    # Whether the base stores its weights as (in, out). No effect: BOFT cannot be put on such layers.
    fan_in_fan_out: bool = False
    # Biases of the base to train with the adapter: "none", "all", or "boft_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Whether nothing changes at first; otherwise the blocks are drawn from N(0, 0.1) and the factors c from N(1, 0.1).
    init_weights: bool = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ValueError(
                f"Either `boft_block_size` or `boft_block_num` must be non-zero, and not both: they are "
                f"{self.boft_block_size} and {self.boft_block_num}, and their product is the size of the input."
            )


def _check(config: BOFTConfig) -> None:
    check_positive(boft_n_butterfly_factor=config.boft_n_butterfly_factor)


def _blocks(size: int, config: BOFTConfig, path: str) -> tuple[int, int]:
    """The number of blocks of a factor and their side, for an input of `size` values.

    Raises:
        ValueError: the input cannot be cut so, or not for so many factors.
    """
    given, field = (
        (config.boft_block_size, "boft_block_size")
        if config.boft_block_size
        else (config.boft_block_num, "boft_block_num")
    )
    if size % given:
        raise ValueError(
            f"{path}: the input has {size} values, which `{field}` ({given}) divides not. Choose another one."
        )
    count, side = (size // given, given) if config.boft_block_size else (given, size // given)
    wide = 2 ** (config.boft_n_butterfly_factor - 1)
    if wide > 1 and (side % 2 or count % wide):
        raise ValueError(
            f"{path}: {config.boft_n_butterfly_factor} butterfly factors need an even block size and a multiple of {wide} "
            f"blocks; here are {count} blocks of {side}. Lower `boft_n_butterfly_factor`, or choose another `{field}`."
        )
    return count, side


class BOFT(AdapterLayer):
    """What BOFT on every kind of layer shares."""

    numbers = MappingProxyType({"boft_block_size": "boft_block_size", "boft_block_num": "boft_block_num"})
    boft_R, boft_s = Held(), Held()

    @classmethod
    def size(cls, base: nn.Module, path: str) -> int:
        """How many values of the layer at `path` are rotated together.

        Raises:
            ValueError: the layer cannot be adapted.
        """
        raise NotImplementedError

    @classmethod
    def slots(cls, base: nn.Module, config: BOFTConfig, path: str) -> dict[str, Slot]:
        count, side = _blocks(cls.size(base, path), config, path)
        return {
            "boft_R": Slot((config.boft_n_butterfly_factor, count, side, side)),
            "boft_s": Slot(cls.shape_of_scale(features(base)[1])),
        }

    @classmethod
    def shape_of_scale(cls, size_out: int) -> tuple[int, int]:
        """The shape of the factors of so many outputs."""
        raise NotImplementedError

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: BOFTConfig) -> None:
        if config.init_weights:
            nn.init.zeros_(tensors["boft_R"])
            nn.init.ones_(tensors["boft_s"])
        else:
            nn.init.normal_(tensors["boft_R"], mean=0.0, std=0.1)
            nn.init.normal_(tensors["boft_s"], mean=1.0, std=0.1)

    def prepare(self, base: nn.Module, config: BOFTConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.boft_block_num, self.boft_block_size = _blocks(self.size(base, path), config, path)
        self.share_dropped, self.factor_count = config.boft_dropout, config.boft_n_butterfly_factor

    def rotations(self) -> torch.Tensor:
        """The blocks of all factors, (m, blocks, s, s), in the dtype of the trained tensor or a wider one."""
        found = cayley(_skew(self.boft_R))
        if not self.drops:
            return found
        factor = int(torch.randint(len(found), (1,)))
        left = torch.zeros(found.shape[:2], dtype=torch.bool, device=found.device)
        left[factor, torch.randperm(found.shape[1])[: int(self.share_dropped * found.shape[1])]] = True
        return torch.where(left[..., None, None], torch.eye(found.shape[-1]).to(found), found)

    @property
    def drops(self) -> bool:
        """Whether some blocks rotate nothing in a call."""
        return bool(self.share_dropped and self.training)

    def rotated(self, x: torch.Tensor, back: bool = False) -> torch.Tensor:
        """`x R`, or `x R^T` where `back`, for rows `x` (..., size), in their dtype."""
        factors = self.rotations().to(x.dtype)
        return self._by_factor(
            x, lambda number, cut: torch.bmm(cut, factors[number].mT if back else factors[number]), back
        )

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """`x R` for few rows, without R."""
        own = self.boft_R
        wide = x.to(torch.promote_types(own.dtype, torch.float32))
        return self._by_factor(wide, lambda number, cut: each_block(_turned, cut, own[number])).to(x.dtype)

    def _by_factor(
        self, x: torch.Tensor, turn: Callable[[int, torch.Tensor], torch.Tensor], back: bool = False
    ) -> torch.Tensor:
        """`x` (..., size), which each factor in turn does something to: its number, and (blocks, rows, s) as it cuts them."""
        s, order = self.boft_block_size, range(self.factor_count)
        for number in order if back else reversed(order):
            cut = _permuted(x, s // 2, 2, 2**number) if number else x
            done = in_rows(turn(number, in_blocks(cut, s)), cut)
            x = _permuted(done, s // 2, 2**number, 2) if number else done
        return x

    def for_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """`c W R^T`, in the shape of `weight`, and in its dtype or a wider one."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return (self.rotated(wide.flatten(1), back=True) * self.boft_s.view(-1, 1)).view_as(wide)


def _skew(own: torch.Tensor) -> torch.Tensor:
    """The skew-symmetric matrices that blocks (..., s, s) are made from, in float32 at least."""
    wide = own.to(torch.promote_types(own.dtype, torch.float32))  # half precision has no `solve`
    return (wide - wide.mT).div_(2)


def _turned(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return turned(x, _skew(own), None)


def _permuted(x: torch.Tensor, chunk: int, rows: int, columns: int) -> torch.Tensor:
    """The chunks of `x` (..., size), in each of its parts of `rows` times `columns`, as they stand in columns.

    A butterfly puts those with an even number before those with an odd one: two columns; back again: two rows.
    """
    return (
        x.reshape(*x.shape[:-1], x.shape[-1] // (rows * columns * chunk), rows, columns, chunk)
        .transpose(-3, -2)
        .flatten(-4)
    )


class BOFTLayer(Alike, BOFT, InputTransform, OutputTransform):
    """BOFT on a linear layer: `x W'^T = c ((x R) W^T)`, so the last of several adapters is the first that the input meets."""

    first_outside = False

    @classmethod
    def size(cls, base: nn.Module, path: str) -> int:
        return features(base)[0]

    @classmethod
    def shape_of_scale(cls, size_out: int) -> tuple[int, int]:
        return size_out, 1

    def prepare(self, base: nn.Module, config: BOFTConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.has_bias = bias_of(base) is not None

    def likeness(self) -> Hashable:
        return self.boft_block_size

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        check_values(self.boft_R, x)
        # In the dtype of `x`, as the reference does. For gradients of its tensor R is made: with other last bits an optimizer
        # may go another way than the one that a checkpoint was trained on.
        few = is_few(x, self.boft_block_size, None) and not (gets_gradients(self) or self.drops)
        return self.turned(x) if few else self.rotated(x)

    def transform_output(self, y: torch.Tensor) -> torch.Tensor:
        scale, bias = self.boft_s.flatten(), tensor_in_use(self.base, "bias", self) if self.has_bias else None
        scaled = y * scale if bias is None else torch.addcmul(bias.to(scale.dtype), y - bias, scale)
        return scaled.to(y.dtype)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return self.for_weight(weight) - weight

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bias = scaled_bias(self, tensors, self.boft_s.flatten()) if self.has_bias else None
        found = super().deltas(tensors)
        return found if bias is None else {**found, "bias": bias}


class BOFTConv(BOFT, WeightTransform):
    """BOFT on a two-dimensional convolution: each output's kernel is rotated as a whole."""

    @classmethod
    def size(cls, base: nn.Module, path: str) -> int:
        return flat_inputs(base, path, "BOFT")

    @classmethod
    def shape_of_scale(cls, size_out: int) -> tuple[int, int]:
        return 1, size_out

    def transformed(self, weight: torch.Tensor) -> torch.Tensor:
        return self.for_weight(weight)


def with_one_factor(
    checkpoint: Checkpoint, config: BOFTConfig, network: nn.Module, modules: Mapping[str, nn.Module]
) -> Reading | None:
    """A checkpoint of a machine that could not compile the reference's kernel, which then trains one factor of several."""
    factors = {entry.shape[:1] for name, entry in checkpoint.entries.items() if name.endswith(".boft_R")}
    if config.boft_n_butterfly_factor == 1 or factors != {(1,)}:
        return None
    note = f"its config says {config.boft_n_butterfly_factor} butterfly factors, and it was trained with one: read with one"
    return Reading(checkpoint, copy_config(config, boft_n_butterfly_factor=1), (note,))


def _dropout(layer: BOFT) -> nn.Module:
    return nn.Dropout(layer.share_dropped) if layer.share_dropped else nn.Identity()


METHOD = register(
    Method(
        name=PeftType.BOFT,
        summary="Rotates the input of a layer by a product of sparse orthogonal matrices, and scales its outputs.",
        config=BOFTConfig,
        prefix="boft_",
        tensor_names=frozenset({"boft_R", "boft_s"}),
        layers=MappingProxyType({LayerKind.LINEAR: BOFTLayer, LayerKind.CONV2D: BOFTConv}),
        containers=("boft_R", "boft_s"),
        layer_views=MappingProxyType({"boft_dropout": _dropout}),
        default_targets=LORA_TARGETS,
        readings=(with_one_factor,),
        check=_check,
        paper="arXiv 2311.06243",
    )
)
