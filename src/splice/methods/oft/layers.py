"""OFT: the input of a layer is rotated, block by block, by trained orthogonal matrices.

Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280; on the input's side and with
the truncated series as in "Orthogonal Finetuning Made Scalable", arXiv 2506.19847. `y = base(x R)`, R block-diagonal with
blocks worked out from skew-symmetric Q by the Cayley transform `(I - Q)(I + Q)^-1`, or by a series for its inverse: a
checkpoint belongs to one of the two, as its config says.
"""

from __future__ import annotations

from collections.abc import Hashable
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import LayerKind, features, kind_of
from splice.errors import warn
from splice.kinds.as_one import Alike
from splice.kinds.casting import cast_to
from splice.kinds.convolution import as_convolution
from splice.kinds.input_transform import InputTransform
from splice.kinds.layer import AdapterLayer
from splice.kinds.output_transform import OutputTransform
from splice.kinds.slot import Slot
from splice.kinds.tensors import gets_gradients
from splice.methods.oft.config import OFTConfig
from splice.methods.rotations import (
    cayley,
    each_block,
    flat_inputs,
    in_blocks,
    in_rows,
    is_few,
    nearest_divisor,
    series,
    skew_places,
    turned,
)


def blocks(size: int, config: OFTConfig) -> tuple[int, int]:
    """The number of blocks and their size, for an input of `size` values: the divisors nearest to the config's."""
    if config.oft_block_size:
        block = nearest_divisor(size, config.oft_block_size)
        return size // block, block
    count = nearest_divisor(size, config.r)
    return count, size // count


class OFT(Alike, AdapterLayer):
    """What OFT on every kind of layer shares."""

    numbers = MappingProxyType({"r": "r", "oft_block_size": "oft_block_size"})
    least = 16
    # Suffix of the trained tensor.
    tensor_name: ClassVar[str] = "oft_R.weight"

    @classmethod
    def size(cls, base: nn.Module, path: str) -> int:
        """How many values of the layer at `path` are rotated together.

        Raises:
            ValueError: the layer cannot be adapted.
        """
        raise NotImplementedError

    @classmethod
    def slots(cls, base: nn.Module, config: OFTConfig, path: str) -> dict[str, Slot]:
        count, block = blocks(cls.size(base, path), config)
        return {cls.tensor_name: Slot((1 if config.block_share else count, block * (block - 1) // 2))}

    @classmethod
    def resolved(cls, base: nn.Module, config: OFTConfig) -> dict[str, object]:
        return {"fan_in_fan_out": False} if kind_of(base) is LayerKind.LINEAR else {}

    def prepare(self, base: nn.Module, config: OFTConfig, path: str) -> None:
        self.r, self.oft_block_size = blocks(self.size(base, path), config)
        self.places = skew_places(self.oft_block_size)
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.radius = config.eps if config.coft else None

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: OFTConfig) -> None:
        count, block = blocks(cls.size(base, ""), config)
        name, wanted, used = (
            ("oft_block_size", config.oft_block_size, block) if config.oft_block_size else ("r", config.r, count)
        )
        if wanted != used:  # a checkpoint's own shapes say so already
            warn(f"Invalid `{name}` ({wanted})! Adjusted `{name}` to ({used}).")
        (values,) = tensors.values()
        # Q = 0 makes R the identity, in the exact form and in the series alike.
        nn.init.zeros_(values) if config.init_weights else nn.init.normal_(values, std=0.1)

    def likeness(self) -> Hashable:
        # COFT writes to the tensor itself.
        return None if self.radius is not None else (self.oft_block_size, self.terms)

    def values(self) -> torch.Tensor:
        """The trained tensor (blocks, values above the diagonal)."""
        return self.tensor(self.tensor_name)

    def rotation(self) -> torch.Tensor:
        """The blocks of R, (blocks, s, s) or (1, s, s) where they share one; in the dtype of the trained tensor.

        It is worked out at every call: nothing tells that values were changed through `.data`.
        """
        q = self._skew(self._wide_values())
        found = cayley(q) if self.terms is None else series(q, self.terms)
        return found.to(self.values().dtype)

    def rotated(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """`x` (..., size) with each block of its last dimension multiplied by that of `rotation`."""
        # One product for each block and not for each vector, which would read the block anew for every token.
        return in_rows(torch.bmm(in_blocks(x, self.oft_block_size), rotation.expand(self.r, -1, -1)), x)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """`x R`, in the dtype of `x`."""
        values = self.values()
        own = cast_to(x, values)
        # For gradients of its tensor R is made: with other last bits an optimizer may go another way than the one that a
        # checkpoint was trained on.
        if gets_gradients(self) or not is_few(own, self.oft_block_size, self.terms):
            return self.rotated(own, self.rotation()).to(x.dtype)
        wide = self._wide_values()
        pieces = in_blocks(own.to(wide.dtype), self.oft_block_size)
        return in_rows(each_block(self._turned_pieces, pieces, wide), own).to(x.dtype)

    def _turned_pieces(self, pieces: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        q = self._skew(own)
        return turned(pieces, q if len(q) == len(pieces) else q.repeat_interleave(len(pieces) // len(q), 0), self.terms)

    def _wide_values(self) -> torch.Tensor:
        own = self.values()
        if self.radius is not None:
            self._project(own, self.radius)
        # Half precision has no `solve`, and the powers of the series would be rounded one by one.
        return own if own.dtype in (torch.float32, torch.float64) else own.float()

    def _skew(self, own: torch.Tensor) -> torch.Tensor:
        """Q, (blocks, s, s)."""
        place, sign = self.places
        if place.device != own.device or sign.dtype is not own.dtype:
            self.places = place, sign = place.to(own.device), sign.to(own)
        if not own.shape[1]:  # blocks of one value, which cannot be turned
            return own.new_zeros(len(own), 1, 1)
        return own.index_select(1, place).view(-1, *sign.shape).mul_(sign)

    @torch.no_grad()
    def _project(self, own: torch.Tensor, eps: float) -> None:
        """COFT: bring blocks back that are too far from the identity. In place, as what is saved has to be."""
        radius = eps / len(own) ** 0.5
        norm = own.norm(dim=1, keepdim=True) * 2**0.5
        own.copy_(torch.where(norm > radius, own * (radius / norm), own))


class OFTInput(OFT, InputTransform):
    """OFT where the input is rotated."""

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        return self.turned(x)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        # x is a row: `(x R) W^T = x (W R^T)^T`, so the merged weight is W R^T.
        rotation = self.rotation().mT.to(torch.promote_types(weight.dtype, torch.float32))
        wide = weight.to(rotation.dtype)
        return self.rotated(wide.flatten(1), rotation).view_as(wide) - wide


class OFTLayer(OFTInput):
    """OFT on a linear layer."""

    @classmethod
    def size(cls, base: nn.Module, path: str) -> int:
        return features(base)[0]


class OFTEmbedding(OFT, OutputTransform):
    """OFT on an embedding: what was looked up is rotated."""

    tensor_name = "oft_embedding_R.weight"

    @classmethod
    def size(cls, base: nn.Module, path: str) -> int:
        return features(base)[1]

    def transform_output(self, y: torch.Tensor) -> torch.Tensor:
        return self.turned(y)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        rotation = self.rotation().to(torch.promote_types(weight.dtype, torch.float32))
        wide = weight.to(rotation.dtype)
        return self.rotated(wide, rotation) - wide


class OFTConv(OFTInput):
    """OFT on a two-dimensional convolution.

    With a kernel of one pixel its channels are rotated. With a larger one the reference takes the image apart into
    patches, rotates each and adds them up again in an order that is not theirs, so it is no rotation, not even at the
    start. Adapters were trained with exactly that, so it is done here as well. No weight does the same: merging gives
    `W R^T`, what was meant.
    """

    @classmethod
    def size(cls, base: nn.Module, path: str) -> int:
        if as_convolution(base).dilation[0] > 1:
            raise ValueError(
                f"{path}: Conv2d with dilation > 1 is not supported by OFT; exclude it with `exclude_modules`."
            )
        return flat_inputs(base, path, "OFT")

    def prepare(self, base: nn.Module, config: OFTConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.kernel = as_convolution(base).kernel_size[0]
        self.merges_exactly = self.kernel == 1

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        rotation = self.rotation()
        image = cast_to(x if x.dim() == 4 else x.unsqueeze(0), rotation)
        patches = F.unfold(image, self.kernel).mT  # (batch, places, channels * k * k)
        turned = self.rotated(patches, rotation)
        height, width = image.shape[2:]
        rows, columns = height - self.kernel + 1, width - self.kernel + 1
        places = turned.view(-1, rows, columns, image.shape[1], self.kernel, self.kernel)
        mixed = places.permute(0, 3, 1, 2, 4, 5).reshape(len(image), -1, rows * columns)
        return F.fold(mixed, (height, width), self.kernel).reshape(x.shape).to(x.dtype)
