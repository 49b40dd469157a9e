"""The merged-linear LoRA of 2023 (`enable_lora`), read as plain LoRA.

Hu et al., arXiv 2106.09685, section 4.2 adapt some of the stacked query, key and value products of one layer. With k of
n parts enabled, the file holds A (k r, in) and B (k out / n, k r / g, 1), the weight of a convolution with g groups. With as
many groups as enabled parts the i-th of them gets `B_i A_i`. The reference of that time always made two groups, however many
parts are enabled, so that the borders of groups may lie inside a part. Either is a plain LoRA of rank k r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from splice.checkpoint.header import Entry
from splice.checkpoint.tensors import Weights
from splice.config import copy_config
from splice.kinds.derived import Derived
from splice.kinds.reading import Checkpoint, Reading
from splice.methods.lora.config import LoraConfig

_B = ".lora_B.weight"
# What the reference had for every number of enabled parts.
_GROUPS = 2


class Unmerged(Derived):
    """The tensors of such a checkpoint, each B (k out / n, k r / g, 1) as its plain form (out, k r)."""

    def __init__(self, weights: Weights, enabled: Sequence[bool], rank: int) -> None:
        self.weights, self.enabled, self.rank = weights, enabled, rank
        self.place = weights.place
        self.metadata = weights.metadata
        self.entries: Mapping[str, Entry] = {
            name: _plain_entry(entry, enabled, rank) if name.endswith(_B) else entry
            for name, entry in weights.entries.items()
        }

    def read(self, names: Sequence[str], into: Mapping[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
        tensors = self.weights.read(names)
        return [_plain(t, self.enabled, self.rank) if name.endswith(_B) else t for name, t in zip(names, tensors)]


def as_plain(
    checkpoint: Checkpoint, config: LoraConfig, network: nn.Module, modules: Mapping[str, nn.Module]
) -> Reading | None:
    """The checkpoint and its config as plain LoRA; None where it is nothing of the kind."""
    enabled = checkpoint.legacy.get("enable_lora")
    if not isinstance(enabled, list) or not any(enabled) or not all(isinstance(e, bool) for e in enabled):
        return None
    parts, entries = sum(enabled), checkpoint.weights.entries
    rank = parts * config.r
    grouped = [entry.shape for name, entry in entries.items() if name.endswith(_B)]
    if not grouped or not all(_is_grouped(shape, parts, rank) for shape in grouped):
        return None
    plain = copy_config(config, r=rank, lora_alpha=parts * config.lora_alpha)
    note = f"merged-linear LoRA of rank {config.r} on parts {enabled} of each layer: read as plain LoRA of rank {rank}"
    return Reading(checkpoint._replace(weights=Unmerged(checkpoint.weights, enabled, rank)), plain, (note,))


def _is_grouped(shape: Sequence[int], parts: int, rank: int) -> bool:
    """Whether a B of this shape belongs to so many enabled parts and so many rows of A."""
    if len(shape) != 3 or shape[2] != 1 or not shape[1] or rank % shape[1]:
        return False
    groups = rank // shape[1]
    return groups in (parts, _GROUPS) and shape[0] % groups == 0 and shape[0] % parts == 0


def _plain_entry(entry: Entry, enabled: Sequence[bool], rank: int) -> Entry:
    shape = (entry.shape[0] // sum(enabled) * len(enabled), rank)
    return Entry(entry.dtype, shape, entry.offset, entry.size * math.prod(shape) // max(1, math.prod(entry.shape)))


def _plain(grouped: torch.Tensor, enabled: Sequence[bool], rank: int) -> torch.Tensor:
    """(k out / n, k r / g, 1) -> (out, k r): one block for each group, in the rows of the enabled parts; zero elsewhere."""
    block_diag: Callable[..., torch.Tensor] = torch.block_diag  # which has no types
    blocks = block_diag(*grouped.squeeze(2).chunk(rank // grouped.shape[1]))
    result = grouped.new_zeros(len(enabled), len(blocks) // sum(enabled), rank)
    result[torch.tensor(enabled)] = blocks.view(sum(enabled), -1, rank)
    return result.flatten(0, 1)
