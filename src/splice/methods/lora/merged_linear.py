"""The merged-linear LoRA of 2023 (`enable_lora`), read as plain LoRA.

Hu et al., arXiv 2106.09685, section 4.2 adapt some of the stacked query, key and value products of one layer. With k of
n parts enabled, the file holds A (k r, in) and B (k out / n, r, 1), the weight of a convolution with k groups: the part
that comes i-th among the enabled ones gets `B_i A_i`. That is a plain LoRA of rank k r whose B has these blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from splice.checkpoint.header import Entry
from splice.checkpoint.tensors import Weights
from splice.config import copy_config
from splice.kinds.reading import Checkpoint, Reading
from splice.methods.lora.config import LoraConfig

_B = ".lora_B.weight"


class Unmerged:
    """The tensors of such a checkpoint, each B (k out / n, r, 1) as its plain form (out, k r)."""

    def __init__(self, weights: Weights, enabled: Sequence[bool]) -> None:
        self.weights, self.enabled = weights, enabled
        self.place = weights.place
        self.metadata = weights.metadata
        self.entries: Mapping[str, Entry] = {
            name: _plain_entry(entry, enabled) if name.endswith(_B) else entry
            for name, entry in weights.entries.items()
        }

    def read(self, names: Sequence[str]) -> list[torch.Tensor]:
        tensors = self.weights.read(names)
        return [_plain(t, self.enabled) if name.endswith(_B) else t for name, t in zip(names, tensors)]


def as_plain(
    checkpoint: Checkpoint, config: LoraConfig, network: nn.Module, modules: Mapping[str, nn.Module]
) -> Reading | None:
    """The checkpoint and its config as plain LoRA; None where it is nothing of the kind."""
    enabled = checkpoint.legacy.get("enable_lora")
    if not isinstance(enabled, list) or not any(enabled) or not all(isinstance(e, bool) for e in enabled):
        return None
    parts, entries = sum(enabled), checkpoint.weights.entries
    grouped = [entry.shape for name, entry in entries.items() if name.endswith(_B)]
    if not grouped or not all(len(s) == 3 and s[1:] == (config.r, 1) and s[0] % parts == 0 for s in grouped):
        return None
    rank = parts * config.r
    plain = copy_config(config, r=rank, lora_alpha=parts * config.lora_alpha)
    note = f"merged-linear LoRA of rank {config.r} on parts {enabled} of each layer: read as plain LoRA of rank {rank}"
    return Reading(checkpoint._replace(weights=Unmerged(checkpoint.weights, enabled)), plain, (note,))


def _plain_entry(entry: Entry, enabled: Sequence[bool]) -> Entry:
    rows, rank, _ = entry.shape
    parts = sum(enabled)
    shape = (rows // parts * len(enabled), parts * rank)
    return Entry(entry.dtype, shape, entry.offset, entry.size * math.prod(shape) // max(1, math.prod(entry.shape)))


def _plain(grouped: torch.Tensor, enabled: Sequence[bool]) -> torch.Tensor:
    """(k out / n, r, 1) -> (out, k r): one block for each enabled part, zero elsewhere."""
    parts, rank = sum(enabled), grouped.shape[1]
    rows = grouped.shape[0] // parts
    result = grouped.new_zeros(rows * len(enabled), parts * rank)
    blocks = iter(torch.split(grouped.squeeze(2), rows))
    done = 0
    for index, on in enumerate(enabled):
        if on:
            result[index * rows : (index + 1) * rows, done : done + rank] = next(blocks)
            done += rank
    return result
