"""QA-LoRA: A sees the means of groups of inputs, as many as share a zero point in the base.

Xu et al., "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models", arXiv 2309.14717, section 3. With g
inputs in a group and n groups, A (r, n) and m (n) the means: `y = base(x) + s * n B A m`. That is plain LoRA whose A repeats
each column g times, times n / g; so on layers that are stored in another way its adapters are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.backends.finding import backend_of
from splice.base.layers import features, kind_of
from splice.checkpoint.header import Entry
from splice.checkpoint.keys import PREFIX
from splice.checkpoint.tensors import Weights
from splice.config import copy_config
from splice.kinds.derived import Derived
from splice.kinds.effect import Factors
from splice.kinds.reading import Checkpoint, Reading
from splice.kinds.slot import Slot
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.layers import OnLinear, product

_A = ".lora_A.weight"


def is_for(base: nn.Module) -> bool:
    """Whether the reference puts QA-LoRA on `base`: where it is asked for elsewhere, it takes plain LoRA."""
    backend = backend_of(base)
    return backend is not None and backend.grouped_inputs


def repeated(a: torch.Tensor, group: int) -> torch.Tensor:
    """The A (r, in) of the plain LoRA that computes what QA-LoRA does with `a` (r, in / group)."""
    return a.repeat_interleave(group, dim=1) * (a.shape[1] / group)


class QaloraLinear(OnLinear):
    """QA-LoRA on a linear layer."""

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        size_in, group = features(base)[0], config.qalora_group_size
        if group < 1 or size_in % group:
            raise ValueError(
                f"{path}: `use_qalora` requires in_features ({size_in}) to be divisible by `qalora_group_size` ({group})."
            )
        found = super().slots(base, config, path)
        return {**found, "lora_A.weight": Slot((found["lora_A.weight"].shape[0], size_in // group))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        super().initialise(tensors, base, config)
        nn.init.kaiming_uniform_(tensors["lora_A.weight"], a=math.sqrt(5))  # whatever the config says of both

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.group = config.qalora_group_size

    def down(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.shape[-1] // self.group
        means = x.reshape(*x.shape[:-1], groups, self.group).mean(-1)
        return F.linear(means * groups, self.a)

    def own_update(self) -> torch.Tensor:
        return self.scale * product(self.b, repeated(self.a, self.group))

    def plain(self) -> Factors:
        return Factors(repeated(self.a, self.group), self.b, float(self.scale))


class Repeated(Derived):
    """The tensors of such a checkpoint, with these A as those of plain LoRA."""

    def __init__(self, weights: Weights, names: frozenset[str], group: int) -> None:
        self.weights, self.names, self.group = weights, names, group
        self.place = weights.place
        self.metadata = weights.metadata
        self.entries: Mapping[str, Entry] = {
            name: self._repeated_entry(entry) if name in names else entry for name, entry in weights.entries.items()
        }

    def _repeated_entry(self, entry: Entry) -> Entry:
        rank, columns = entry.shape
        return Entry(entry.dtype, (rank, columns * self.group), entry.offset, entry.size * self.group)

    def read(self, names: Sequence[str], into: Mapping[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
        tensors = self.weights.read(names)
        return [repeated(t, self.group) if name in self.names else t for name, t in zip(names, tensors)]


def as_plain_elsewhere(
    checkpoint: Checkpoint, config: LoraConfig, network: nn.Module, modules: Mapping[str, nn.Module]
) -> Reading | None:
    """The A of layers whose inputs share no zero points as those of plain LoRA; None where there are none of QA-LoRA."""
    if not config.use_qalora:
        return None
    group, found, left = config.qalora_group_size, set(), False
    for name, own in checkpoint.names.items():
        base = modules.get(name.removeprefix(PREFIX).removesuffix(_A)) if name.endswith(_A) else None
        if base is None or kind_of(base) is None:
            continue
        if is_for(base):
            left = True
        elif features(base)[0] == checkpoint.weights.entries[own].shape[-1] * group:
            found.add(own)
    if group < 2 or not found:
        return None
    weights = Repeated(checkpoint.weights, frozenset(found), group)
    note = f"QA-LoRA with groups of {group}, on layers whose inputs share no zero points: read as plain LoRA"
    changed = config if left else copy_config(config, use_qalora=False)
    return Reading(checkpoint._replace(weights=weights), changed, (note,))
