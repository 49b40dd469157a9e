"""LoftQ: LoRA beside a weight that is rounded to few bits, which A and B make up for when they start.

Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659, algorithm 1. From
A_0 B_0 = 0, each round takes `Q = round(W - B A)`, and for B A the best approximation of rank r of `W - Q`. With the last Q:
`y = Q x + s * B A x`. The rounded weight follows from the base's own, so a load works it out again.

Four bits are NF4 (Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E), eight those of LLM.int8() (arXiv 2208.07339).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from splice.base.weight_access import is_plain
from splice.errors import UnsupportedFeatureError
from splice.kinds.effect import Effect, Factors
from splice.kinds.lasting import lasting
from splice.kinds.original import original_weight
from splice.kinds.tensors import Held
from splice.methods.lora.config import LoraConfig, loftq_options
from splice.methods.lora.layers import OnLinear
from splice.methods.lora.residual import Residual

_WIDE = (torch.float32, torch.float64)
_BLOCK = 64
# Quantiles of the normal distribution, as they are published.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# What the kernels of 8-bit layers multiply with in the place of 1 / 127.
_INT8_STEP = 7.874015718698502e-3


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """`weight` (out, in), float32, with each value as near as 4 or 8 bits come to it."""
    return _nf4(weight) if bits == 4 else _int8(weight)


def _nf4(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of 64 in memory order share a scale, their largest value."""
    padded = nn.functional.pad(weight.flatten(), (0, -weight.numel() % _BLOCK)).view(-1, _BLOCK)
    largest = padded.abs().amax(1, keepdim=True)
    scaled = padded / largest.clamp_min(torch.finfo(padded.dtype).tiny)
    levels = torch.tensor(_NF4, dtype=weight.dtype, device=weight.device)
    # The nearest of sorted levels: count the midpoints below.
    nearest = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * largest).flatten()[: weight.numel()].view(weight.shape)


def _int8(weight: torch.Tensor) -> torch.Tensor:
    """Each row has a scale; the values are looked at in half precision."""
    half = weight.half().to(weight.dtype)
    largest = half.abs().amax(1, keepdim=True)
    steps = torch.round(half * torch.where(largest > 0, 127 / largest, 0))
    return steps * largest * _INT8_STEP


def decomposed(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank) whose product comes nearest to `weight`."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def quantised(weight: torch.Tensor, bits: int, rounds: int, rank: int) -> torch.Tensor:
    """The rounded weight after so many rounds, for `weight` (out, in) in float32."""
    result = rounded(weight, bits)
    for _ in range(rounds - 1):
        a, b = decomposed(weight - result, rank)
        result = rounded(weight - b @ a, bits)
    return result


class LoftqLinear(OnLinear):
    """LoftQ on a linear layer. The base keeps its weight; the rounded one is held beside it, and is not saved."""

    reads_weight = True
    shows = True
    quantised = Held()

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        if not is_plain(base):
            raise UnsupportedFeatureError(
                f"{path}: `init_lora_weights='loftq'` puts a rounded weight in the place of the base's, and this base is "
                "quantised already. Load the adapter with `init_lora_weights=True` (it was trained beside such a base), or "
                "begin a new one so and call `replace_lora_weights_loftq`."
            )
        self.bits, self.rounds = loftq_options(config)
        self._quantise()

    @lasting()
    def _quantise(self) -> None:
        weight = original_weight(self.base)
        wide = weight if weight.dtype in _WIDE else weight.float()
        if weight.is_meta:
            self.keep("quantised", torch.empty_like(weight))
            return
        self.keep("quantised", quantised(wide, self.bits, self.rounds, self.r).to(weight.dtype))

    def _current(self) -> torch.Tensor:
        # Left empty where the adapter was made without values; the base has its own by the time of a call.
        if self.quantised.is_meta and not self.a.is_meta:
            self._quantise()
        return self.quantised

    def shown(self, base: nn.Module) -> dict[str, torch.Tensor]:
        return {**super().shown(base), "weight": self._current()}

    def replaced(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"weight": self._current()}

    def plain(self) -> Factors:
        raise UnsupportedFeatureError(
            "LoftQ (`init_lora_weights='loftq'`) puts a rounded weight in the place of the base's, so its adapters have no "
            "sum that is an adapter. One alone with weight 1.0 can be copied; else leave it out."
        )

    def conflict(self, other: Effect) -> str:
        return (
            "each puts another weight in the place of the base's" if isinstance(other, (LoftqLinear, Residual)) else ""
        )

    @torch.no_grad()
    def begin(self) -> None:
        weight = original_weight(self.base)
        if not weight.is_meta:
            wide = weight if weight.dtype in _WIDE else weight.float()
            start = decomposed(wide - quantised(wide, self.bits, self.rounds, self.r), self.r)
            self.a.copy_(start[0])
            self.b.copy_(start[1])
        super().begin()
