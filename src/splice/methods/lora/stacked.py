"""The tensors of adapters for experts that were layers, joined to those of the parameters they are now (`experts.py`).

All experts of a parameter lie in one pair of tensors as `parameters.py` says: in A (rank * experts, in) the rows
of one expert behind one another, in B (out, rank * experts) the columns of one rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn

from splice.checkpoint.header import Entry
from splice.checkpoint.keys import format_key, parse_key
from splice.checkpoint.tensors import Weights
from splice.config import copy_config
from splice.kinds.derived import Derived
from splice.kinds.reading import Checkpoint, Reading
from splice.methods.lora.config import TENSOR_NAMES, LoraConfig
from splice.methods.lora.experts import Stack, experts_of, joined_ranks, joined_values, part_values, restated, scale_of


class _Part(NamedTuple):
    """The tensors of one part for every expert, by their names in the file; `scale` is relative to the stack's."""

    # Names of the tensors A, one for each expert.
    a: Sequence[str]
    # Names of the tensors B, one for each expert.
    b: Sequence[str]
    # r, the same for all experts.
    rank: int
    # What B is multiplied with, so that the stack's scale fits this part too.
    scale: float


class _Joined(NamedTuple):
    """A stack's pair of tensors, made of those of its parts; None for a part that was not adapted."""

    # The parameter that the pair is for.
    stack: Stack
    # Its parts, in their order.
    parts: Sequence[_Part | None]

    @property
    def rank(self) -> int:
        return sum(part.rank for part in self.parts if part)

    @property
    def sources(self) -> list[str]:
        return [name for part in self.parts if part for name in (*part.a, *part.b)]

    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        experts, size_out, size_in = self.stack.shape
        return (self.rank * experts, size_in), (size_out, self.rank * experts)

    def a(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(experts * rank, in)."""
        return _join_a([[tensors[name] for name in part.a] if part else [] for part in self.parts])

    def b(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(out, rank * experts)."""
        scales = [part.scale if part else 0.0 for part in self.parts]
        return _join_b([[tensors[name] for name in part.b] if part else [] for part in self.parts], scales)


def _join_a(parts: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """(experts * rank, in), the rows of one expert behind one another, from (rank, in) of every expert for each part.

    A part that was not adapted has no tensors.
    """
    return torch.cat([tensor for expert in zip(*filter(None, parts)) for tensor in expert])


def _join_b(parts: Sequence[Sequence[torch.Tensor]], scales: Sequence[float]) -> torch.Tensor:
    """(out, rank * experts), the columns of one rank behind one another, from (height, rank) likewise, times `scales`."""
    adapted = [part for part in parts if part]
    experts, height = len(adapted[0]), adapted[0][0].shape[0]
    rank, done = sum(part[0].shape[1] for part in adapted), 0
    result = adapted[0][0].new_zeros(height * len(parts), rank, experts)
    for index, (part, scale) in enumerate(zip(parts, scales)):
        for e, tensor in enumerate(part):
            result[index * height : (index + 1) * height, done : done + tensor.shape[1], e] = tensor * scale
        done += part[0].shape[1] if part else 0
    return result.reshape(height * len(parts), rank * experts)


def _joined_a(config: LoraConfig, owner: str, parts: Mapping[str, Sequence[torch.Tensor]]) -> torch.Tensor:
    return _join_a(list(parts.values()))


def _joined_b(config: LoraConfig, owner: str, parts: Mapping[str, Sequence[torch.Tensor]]) -> torch.Tensor:
    each = [part_values(config, owner, part) for part in parts]
    rank, alpha = joined_ranks(config, each)
    scales = [scale_of(config, *values) / scale_of(config, rank, alpha) for values in each]
    return _join_b(list(parts.values()), scales)


# Suffix of a tensor -> how those of the parts' layers, of all experts, become that of the parameter: `Method.joins`.
JOINS = MappingProxyType({"lora_A.weight": _joined_a, "lora_B.weight": _joined_b})


class StackedExperts(Derived):
    """The tensors of such a checkpoint, with those of the experts joined."""

    def __init__(self, weights: Weights, plain: Mapping[str, str], joined: Mapping[str, _Joined]) -> None:
        self.weights, self.plain, self.joined = weights, plain, joined
        self.place, self.metadata = weights.place, weights.metadata
        self.entries: dict[str, Entry] = {name: weights.entries[own] for name, own in plain.items()}
        for front, stack in joined.items():
            first = weights.entries[stack.sources[0]]
            for name, shape in zip((f"{front}lora_A.weight", f"{front}lora_B.weight"), stack.shapes()):
                size = first.size * math.prod(shape) // math.prod(first.shape)
                self.entries[name] = Entry(first.dtype, shape, first.offset, size)

    def read(self, names: Sequence[str], into: Mapping[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
        owners = {f"{front}lora_{which}.weight": stack for front, stack in self.joined.items() for which in "AB"}
        needed = {own for name in names for own in (owners[name].sources if name in owners else [self.plain[name]])}
        order = sorted(needed)
        tensors = dict(zip(order, self.weights.read(order)))
        result = []
        for name in names:
            if name not in owners:
                result.append(tensors[self.plain[name]])
            else:
                stack = owners[name]
                result.append(stack.a(tensors) if name.endswith("lora_A.weight") else stack.b(tensors))
        return result


def as_stacked(
    checkpoint: Checkpoint, config: LoraConfig, network: nn.Module, modules: Mapping[str, nn.Module]
) -> Reading | None:
    """The checkpoint and its config for stacked experts; None where it is nothing of the kind."""
    experts = experts_of(network, modules)
    if experts is None:
        return None
    entries = checkpoint.weights.entries
    plain: dict[str, str] = {}
    tensors: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
    owners, known_routers, routers = {stack.owner for stack in experts.stacks}, set(experts.routers), set[str]()
    for name, own in checkpoint.names.items():
        key = parse_key(name, TENSOR_NAMES)
        path = "" if key is None else experts.rename(key.path)
        front, _, part = path.rpartition(".")
        owner, _, index = front.rpartition(".")
        if key is not None and owner in owners and index.isdigit():
            tensors.setdefault((owner, part), {}).setdefault(int(index), {})[key.suffix] = own
        else:
            plain[name if key is None else format_key(path, key.suffix)] = own
            if path in known_routers:
                routers.add(path)
    wanted = {
        stack: tuple(part for part in stack.parts if (stack.owner, part) in tensors)
        for stack in experts.stacks
        if any((stack.owner, part) in tensors for part in stack.parts)
    }
    known = {(stack.owner, part) for stack, parts in wanted.items() for part in parts}
    if (not wanted and not routers) or set(tensors) - known:
        return None
    joined = {stack: _joined(stack, parts, tensors, entries, config) for stack, parts in wanted.items()}
    if None in joined.values():
        return None
    weights = StackedExperts(checkpoint.weights, plain, {_front(s, wanted): j for s, j in joined.items() if j})
    names = {name: name for name in weights.entries}
    changed, notes = _without_dropout(restated(config, experts, wanted, routers))
    if wanted:
        shown = ", ".join(sorted({part for _, part in tensors}))
        notes.insert(
            0, f"the experts' layers ({shown}) are stacked parameters in this model: their tensors were joined"
        )
    return Reading(checkpoint._replace(weights=weights, names=names), changed, tuple(notes))


def _joined(
    stack: Stack,
    parts: Sequence[str],
    tensors: Mapping[tuple[str, str], Mapping[int, Mapping[str, str]]],
    entries: Mapping[str, Entry],
    config: LoraConfig,
) -> _Joined | None:
    """The recipe for a stack's tensors; None where an expert's are missing or of another shape."""
    experts, size_out, size_in = stack.shape
    height, scale = size_out // len(stack.parts), scale_of(config, *joined_values(config, stack, parts))
    found: list[_Part | None] = []
    for part in stack.parts:
        if part not in parts:
            found.append(None)
            continue
        each, (rank, alpha) = tensors[stack.owner, part], part_values(config, stack.owner, part)
        pairs = [each.get(e, {}) for e in range(experts)]
        shapes = {"lora_A.weight": (rank, size_in), "lora_B.weight": (height, rank)}
        if len(each) != experts or any({s: entries[own].shape for s, own in pair.items()} != shapes for pair in pairs):
            return None
        a, b = ([pair[suffix] for pair in pairs] for suffix in shapes)
        found.append(_Part(a, b, rank, scale_of(config, rank, alpha) / scale))
    return _Joined(stack, found)


def _front(stack: Stack, wanted: Collection[Stack]) -> str:
    """What stands before the names of a stack's tensors: the module's parameters nest, the last one outermost."""
    same = [other for other in wanted if other.owner == stack.owner]
    order = [other.name for other in same]
    return format_key(stack.owner, "base_layer." * (len(order) - 1 - order.index(stack.name)))


def _without_dropout(config: LoraConfig) -> tuple[LoraConfig, list[str]]:
    """`config` without dropout, which cannot be applied to parameters, and a note where it had some."""
    if not config.lora_dropout:
        return config, []
    note = f"lora_dropout={config.lora_dropout} cannot be applied to stacked experts: read as 0"
    return copy_config(config, lora_dropout=0.0), [note]
