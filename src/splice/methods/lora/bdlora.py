"""BD-LoRA: LoRA with a block-diagonal A or B, so that a layer cut over several devices needs no communication for it.

Of layers whose input is cut A is block-diagonal, of those whose output is cut B is. A checkpoint holds the blocks one
below the other. A part that is not cut is LoRA's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import features
from splice.kinds.effect import Factors
from splice.kinds.slot import Slot
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.layers import OnLinear, product
from splice.methods.lora.subconfigs import BdLoraConfig, options_of


class BdLoraLinear(OnLinear):
    """BD-LoRA on a linear layer, stored either way round."""

    # How many blocks A and B have.
    blocks: tuple[int, int]

    @staticmethod
    def blocks_of(config: LoraConfig, path: str) -> tuple[int, int]:
        """How many blocks A and B have on this layer.

        Raises:
            ValueError: both have, or neither though the config is strict.
        """
        options = options_of(config.use_bdlora, BdLoraConfig)
        # Anywhere in the path, as in the reference: a name may stand in the middle of another.
        in_a, in_b = (
            any(part in path for part in named or ())
            for named in (options.target_modules_bd_a, options.target_modules_bd_b)
        )
        if in_a and in_b:
            raise ValueError(f"{path}: BD-LoRA's target_modules_bd_a and target_modules_bd_b both match it; one may.")
        if not in_a and not in_b and options.match_strict:
            raise ValueError(
                f"{path}: neither target_modules_bd_a nor target_modules_bd_b of BD-LoRA matches it. Name it in one of them, "
                "or set `match_strict` to False to have plain LoRA there."
            )
        return (options.nblocks if in_a else 1), (options.nblocks if in_b else 1)

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        (size_in, size_out), (in_a, in_b) = features(base), cls.blocks_of(config, path)
        found = super().slots(base, config, path)
        rank = found["lora_A.weight"].shape[0]
        for what, size, count in (("input", size_in, in_a), ("output", size_out, in_b)):
            if size % count or rank % count:
                raise ValueError(
                    f"{path}: BD-LoRA cuts its {what} of {size} and the rank {rank} into {count} blocks; both have to be "
                    "multiples of that."
                )
        return {
            **found,
            "lora_A.weight": Slot((rank, size_in // in_a)),
            "lora_B.weight": Slot((size_out, rank // in_b)),
        }

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.blocks = self.blocks_of(config, path)

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        super().initialise(tensors, base, config)
        a = tensors["lora_A.weight"]
        if a.shape[1] < features(base)[0]:  # the blocks are drawn as the reference does, wider than A as a whole
            nn.init.kaiming_uniform_(a, a=0)

    def down(self, x: torch.Tensor) -> torch.Tensor:
        return _blockwise(x, self.a, self.blocks[0])

    def up(self, hidden: torch.Tensor) -> torch.Tensor:
        found, bias = _blockwise(hidden, self.b, self.blocks[1]), self.find("lora_B.bias")
        return found if bias is None else found + bias

    def plain(self) -> Factors:
        block_diag: Callable[..., torch.Tensor] = torch.block_diag  # which has no types
        a, b = (block_diag(*factor.chunk(count)) for factor, count in zip((self.a, self.b), self.blocks))
        return Factors(a, b, float(self.scale))

    def own_update(self) -> torch.Tensor:
        found = self.plain()
        return self.scale * product(found.b, found.a)


def _blockwise(x: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    """`x` (..., count * k) with each of its slices multiplied by its block, of which `weight` (out, k) has `count`."""
    if count == 1:
        return F.linear(x, weight)
    slices = x.reshape(*x.shape[:-1], count, -1)
    blocks = weight.view(count, -1, weight.shape[1])
    return torch.einsum("...nk,nok->...no", slices, blocks).reshape(*x.shape[:-1], math.prod(blocks.shape[:2]))
