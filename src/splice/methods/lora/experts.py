"""Experts that were layers and are one parameter now: adapters for mixture-of-experts models from before transformers 5.

There, `experts.3.w1` was a linear layer; now the module `experts` holds `gate_up_proj` (experts, out, in), in which `w1` and
`w3` of every expert lie behind one another, and `down_proj`. A config that names the old layers means parts of these
parameters. For one expert, low-rank updates `s_1 B_1 A_1` and `s_2 B_2 A_2` of two parts are together

    s [[B_1, 0], [0, (s_2 / s) B_2]] [[A_1], [A_2]],

one update of the ranks' sum. This file is about the configs; `stacked.py` joins the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

from torch import nn

from splice.base.conversions import renaming_of, stackings_of
from splice.base.layers import kind_of
from splice.config import TargetRule, copy_config
from splice.kinds.matching import ALL_LINEAR, TargetMatcher, matching_parameters, value_for
from splice.methods.lora.config import LoraConfig

# What a pattern gives to a layer: a rank, an alpha.
V = TypeVar("V")


class Stack(NamedTuple):
    """One parameter of stacked experts: the path of its module, its name, what its parts were called, (experts, out, in)."""

    # Path of the module that holds the parameter.
    owner: str
    # Name of the parameter in it (`gate_up_proj`).
    name: str
    # Names of the old layers whose weights lie behind one another in it (`w1`, `w3`).
    parts: tuple[str, ...]
    # (experts, out, in); `out` is that of all parts together.
    shape: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"


class Experts(NamedTuple):
    """The stacked experts of a network.

    Attributes:
        stacks: its stacked parameters.
        routers: paths of the modules beside them that choose experts. They were linear layers, and have a bare weight now.
        rename: path of a module in older weights -> its path now.
        modules: all modules of the network by path.
    """

    stacks: Sequence[Stack]
    routers: Sequence[str]
    rename: Callable[[str], str]
    modules: Mapping[str, nn.Module]

    @property
    def old_names(self) -> set[str]:
        return {part for stack in self.stacks for part in stack.parts} | {_last(path) for path in self.routers}


def experts_of(network: nn.Module, modules: Mapping[str, nn.Module]) -> Experts | None:
    """The stacked experts of `network`, where it has any."""
    known = {(stacking.container, stacking.parameter): stacking.parts for stacking in stackings_of(network)}
    stacks = []
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 3 and (_last(path), name) in known:
                experts, size_out, size_in = parameter.shape
                stacks.append(Stack(path, name, known[_last(path), name], (experts, size_out, size_in)))
    if not stacks:
        return None
    beside = {stack.owner.rpartition(".")[0] + "." for stack in stacks}
    routers = [
        path
        for path, module in modules.items()
        if path[: len(path) - len(_last(path))] in beside
        and _dimensions(module, "weight") == 2
        and kind_of(module) is None
    ]
    return Experts(stacks, routers, renaming_of(network) or str, modules)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _dimensions(module: nn.Module, name: str) -> int:
    parameter = module._parameters.get(name)
    return 0 if parameter is None else parameter.dim()


# -- the config

# `target_modules` of a config.
Targets: TypeAlias = "list[str] | set[str] | str | None"


def with_stacked_experts(config: LoraConfig, network: nn.Module, modules: Mapping[str, nn.Module]) -> LoraConfig:
    """The config that means for stacked experts what `config` says of the layers they were; itself, if it says nothing.

    Raises:
        ValueError: it names one of the parts of a parameter without the others, for a new adapter.
    """
    experts = experts_of(network, modules)
    if experts is None or not config.target_modules:
        return config
    wanted, routers = _selected(config, experts)
    if not wanted and not routers:
        return config
    for stack, parts in wanted.items():
        if set(parts) != set(stack.parts):
            left = [part for part in stack.parts if part not in parts]
            raise ValueError(
                f"target_modules select {', '.join(parts)} of {stack}, and not {', '.join(left)}: they are one parameter now "
                "and can only be adapted together. Name all of them, or none."
            )
    return restated(config, experts, wanted, routers)


def _selected(config: LoraConfig, experts: Experts) -> tuple[dict[Stack, tuple[str, ...]], list[str]]:
    """Which parts of which stacks, and which routers, the config's targets mean."""
    rule: TargetRule = config.target_rule()
    everything = isinstance(rule.target_modules, str) and rule.target_modules.lower() == ALL_LINEAR
    if not isinstance(rule.target_modules, str):
        # A name may say where the layer was: `block_sparse_moe.gate`.
        names = {experts.rename("." + name)[1:] for name in rule.target_modules or ()}
        rule = rule._replace(target_modules=names)
    matcher = TargetMatcher(rule)

    def means(path: str) -> bool:
        return not matcher.is_excluded(path) if everything else matcher(path)

    def means_part(stack: Stack, part: str) -> bool:
        spelled = (stack.owner, *(f"{stack.owner}.{index}" for index in range(stack.shape[0])))
        return any(means(f"{front}.{part}") for front in spelled)

    found = {stack: tuple(p for p in stack.parts if means_part(stack, p)) for stack in experts.stacks}
    return {stack: parts for stack, parts in found.items() if parts}, [path for path in experts.routers if means(path)]


def restated(
    config: LoraConfig, experts: Experts, wanted: Mapping[Stack, tuple[str, ...]], routers: Collection[str]
) -> LoraConfig:
    """`config` with these parts and routers among its parameters, and no longer among its modules."""
    spelled = [str(stack) for stack in wanted] + [f"{path}.weight" for path in routers]
    parameters = [*(config.target_parameters or ()), *_short(spelled, experts.modules)]
    ranks, alphas = _values(config, wanted)
    return copy_config(
        config,
        target_modules=_modules_left(config.target_modules, experts),
        target_parameters=list(dict.fromkeys(parameters)),
        rank_pattern={**ranks, **_still_meant(config.rank_pattern, experts, wanted)},
        alpha_pattern={**alphas, **_still_meant(config.alpha_pattern, experts, wanted)},
    )


def _still_meant(pattern: Mapping[str, V], experts: Experts, wanted: Mapping[Stack, tuple[str, ...]]) -> dict[str, V]:
    """`pattern` without keys that mean nothing but the layers that were: their values are in those of the stacks."""
    were = [f"{stack.owner}.0.{part}" for stack, parts in wanted.items() for part in parts]
    are = [*experts.modules, *map(str, experts.stacks)]

    def means(key: str, paths: Collection[str]) -> bool:
        return any(value_for({key: True}, path, False) for path in paths)

    return {key: value for key, value in pattern.items() if not means(key, were) or means(key, are)}


def _short(paths: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The ends of these parameters' paths, where they select the same ones, else the whole paths."""
    result = []
    ends = {path: _last(path) if _last(path) != "weight" else ".".join(path.split(".")[-2:]) for path in paths}
    for end in dict.fromkeys(ends.values()):
        meant = [path for path in paths if ends[path] == end]
        hit = [
            f"{path}.{name}" for path, module in modules.items() for name in matching_parameters(module, path, [end])
        ]
        result += [end] if sorted(hit) == sorted(meant) else meant
    return result


def _modules_left(targets: Targets, experts: Experts) -> Targets:
    """`target_modules` without the old names of experts, as far as these are not names of other layers too."""
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return targets
    matcher = TargetMatcher(TargetRule(target_modules=targets))
    hit = [path for path, module in experts.modules.items() if path and matcher(path)]
    layers = [path for path in hit if kind_of(experts.modules[path]) is not None]
    if len(hit) == len(layers) and isinstance(targets, str):
        return targets if layers else []
    if len(hit) == len(layers):
        return {name for name in targets or () if _last(name) not in experts.old_names or _selects(name, layers)}
    names = {_last(path) for path in layers}  # a router was among them
    alike = TargetMatcher(TargetRule(target_modules=names))
    return names if [path for path in experts.modules if path and alike(path)] == layers else set(layers)


def _selects(name: str, layers: Collection[str]) -> bool:
    return any(f".{path}".endswith("." + name) for path in layers)


def _values(config: LoraConfig, wanted: Mapping[Stack, tuple[str, ...]]) -> tuple[dict[str, int], dict[str, float]]:
    """Patterns of ranks and alphas for these stacks, as far as they are not the config's own values."""
    found = {stack: joined_values(config, stack, parts) for stack, parts in wanted.items()}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for stack, (rank, alpha) in found.items():
        if (rank, alpha) == (config.r, config.lora_alpha):
            continue
        alike = all(values == (rank, alpha) for other, values in found.items() if other.name == stack.name)
        key = rf".*\.{stack.name}" if alike else re.escape(str(stack))
        ranks[key], alphas[key] = rank, alpha
    return ranks, alphas


def joined_values(config: LoraConfig, stack: Stack, parts: Sequence[str]) -> tuple[int, float]:
    """Rank and alpha of a stack, from those that the config gives to its parts; the scale is that of the first part."""
    return joined_ranks(config, [part_values(config, stack.owner, part) for part in parts])


def joined_ranks(config: LoraConfig, each: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Rank and alpha of all parts together, from those of each."""
    rank = sum(r for r, _ in each)
    if not config.use_rslora and len(set(each)) == 1:
        return rank, each[0][1] * len(each)
    return rank, scale_of(config, *each[0]) * (math.sqrt(rank) if config.use_rslora else rank)


def part_values(config: LoraConfig, owner: str, part: str) -> tuple[int, float]:
    """Rank and alpha that the config gives to the layers of one part, of the experts at the path `owner`."""
    path = f"{owner}.0.{part}"
    return value_for(config.rank_pattern, path, config.r), value_for(config.alpha_pattern, path, config.lora_alpha)


def scale_of(config: LoraConfig, rank: int, alpha: float) -> float:
    """What the product of the factors is multiplied with."""
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
