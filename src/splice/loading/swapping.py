"""Putting a checkpoint in the place of an adapter that is there, and making room for such."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch

from splice.base.bare import walk_bare
from splice.checkpoint.keys import PREFIX, format_key
from splice.checkpoint.tensors import TensorsInMemory
from splice.config import PeftConfig, copy_config
from splice.errors import AdapterMismatchError, UnsupportedFeatureError, warn
from splice.kinds.effect import note_rescaled
from splice.kinds.layer import AdapterLayer
from splice.kinds.reading import Checkpoint
from splice.kinds.registry import all_methods, method_of
from splice.kinds.swapping import Swapping
from splice.loading.checking import refuse_or_warn
from splice.loading.commit import build_loaded
from splice.loading.kept_config import other_values
from splice.loading.options import LoadOptions
from splice.loading.published.fitting import fitted
from splice.loading.wanted import NewAdapter
from splice.surgery.tuner import Tuner

# Why a layer cannot be exchanged that has no tensors of its own.
_TIED = "it shares its tensors with a layer that is tied to it"


def swapping_of(config: PeftConfig) -> Swapping:
    """How adapters with this config are exchanged.

    Raises:
        ValueError: those of its method are not.
    """
    method = method_of(config)
    if method.swapping is None:
        able = [other.name.value for other in all_methods().values() if other.swapping is not None]
        raise ValueError(
            f"Incompatible PEFT types found: adapters of {method.name.value} cannot be hot-swapped, only those of "
            f"{', '.join(able)}. Load the new one under another name, or delete the old one first."
        )
    return method.swapping


def check_configs(old: PeftConfig, new: PeftConfig) -> None:
    """Raise where an adapter with the config `new` cannot take the place of one with `old`.

    Raises:
        ValueError: they are of two methods, of one without exchange, or of one that computes in another way.
    """
    if method_of(old).name != method_of(new).name:
        raise ValueError(f"Incompatible PEFT types found: {method_of(old).name.value} and {method_of(new).name.value}")
    swapping_of(old).check(old, new)


def check_in_place(tuner: Tuner, name: str, config: PeftConfig) -> None:
    """Raise where tensors of an adapter with this config, put over those of `name` as they are, would compute something else.

    Raises:
        ValueError: there is no such adapter, or the two configs say other ranks, scales or ways to compute.
    """
    tuner.check_known([name])
    own = tuner.peft_config[name]
    check_configs(own, config)
    others = other_values(config, own, tuner.placed[name], also=own.pattern_fields.values())
    if others:
        raise ValueError(
            f"Hot swapping adapter {name!r} in this way puts tensors over tensors, and leaves ranks and scales as they are: "
            f"{'; '.join(others)}. Call `hotswap_adapter(model, folder, {name!r})` (of `splice.hotswap`, or "
            "`peft.utils.hotswap`), which brings them along."
        )


class _Exchange(NamedTuple):
    """One layer of the adapter that is there, and what it becomes."""

    # Its path.
    path: str
    # The adapter's layer.
    old: AdapterLayer
    # That of the new adapter; None where it has none.
    new: AdapterLayer | None


def swap(tuner: Tuner, name: str, checkpoint: Checkpoint) -> None:
    """Let the adapter `name` become what `checkpoint` holds. What fails, fails before anything has changed.

    Its layers stay, and its tensors stay the same objects where they are large enough. Its config says what it is then.

    Raises:
        AdapterMismatchError: (a RuntimeError) there is no such adapter, or the checkpoint has something it has no place for.
        ValueError: the adapter is merged, or the two configs cannot be exchanged.
        UnsupportedFeatureError: a layer of the adapter cannot be.
    """
    if name not in tuner.placed:
        raise AdapterMismatchError(
            f"no adapter {name!r} to put another one in the place of; there are {list(tuner.placed)}"
        )
    if name in tuner.merged or any(name in host.merged for host in tuner.hosts.values()):
        raise ValueError(f"adapter {name!r} is merged; call `unmerge_adapter()` before another one takes its place")
    own = tuner.peft_config[name]
    check_configs(own, checkpoint.config)
    swapping, options = swapping_of(own), LoadOptions(name, False, True, False, None, True, {}, time.perf_counter())
    found = fitted(
        NewAdapter(tuner.model, walk_bare(tuner.model), method_of(own), ()),
        checkpoint,
        copy_config(checkpoint.config),
    )
    plan = refuse_or_warn(found, tuner.model, method_of(own), options)
    new = {item.placement.path: item.layer for item in build_loaded(plan, found.config, found.checkpoint.weights, True)}
    placed = tuner.placed[name]
    extra = [path for path in new if path not in placed]
    if extra:
        raise AdapterMismatchError(
            f"Hot swapping the adapter did not succeed: the new adapter has tensors for {', '.join(extra)}, where the "
            f"adapter {name!r} has none. Load it under another name.",
            unexpected=[key for p in plan.placements if p.path in extra for key in p.keys.values()],
        )
    exchanges = [_Exchange(path, old, new.get(path)) for path, old in placed.items()]
    for path, old, other in exchanges:
        why = _TIED if old.leaders else swapping.refusal(old, other)
        if why:
            raise UnsupportedFeatureError(f"{path}: adapter {name!r} cannot be hot-swapped: {why}.")
    for line in found.warnings:
        warn(f"adapter {name!r}: {line}.")
    _exchange(tuner, name, swapping, exchanges)


def _exchange(tuner: Tuner, name: str, swapping: Swapping, exchanges: list[_Exchange]) -> None:
    """Exchange them all, or none where something cuts it short."""
    kept = [_Kept.of(old) for _, old, _ in exchanges]
    config = tuner.peft_config[name]
    before = dict(vars(config))
    try:
        for _, old, new in exchanges:
            swapping.put(old, new, config)
        vars(config).update(swapping.stated(config, tuner.placed[name]))
    except BaseException:
        for state in kept:
            state.put_back()
        vars(config).update(before)
        raise


class _Kept(NamedTuple):
    """An adapter layer as it was."""

    # The layer.
    layer: AdapterLayer
    # Its attributes.
    numbers: dict[str, object]
    # The values of those that are tensors.
    values: dict[str, torch.Tensor]
    # The tensors that were registered, by suffix, and their values.
    tensors: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, layer: AdapterLayer) -> _Kept:
        tensors = {
            s: (registry[name], registry[name].data.clone()) for s, (registry, name, _) in layer.registered.items()
        }
        numbers = dict(vars(layer))
        values = {name: value.clone() for name, value in numbers.items() if isinstance(value, torch.Tensor)}
        return cls(layer, numbers, values, tensors)

    def put_back(self) -> None:
        """Make it so again."""
        vars(self.layer).update(self.numbers)
        note_rescaled(self.layer)
        for attribute, value in self.values.items():
            vars(self.layer)[attribute].copy_(value)
        for suffix, (tensor, value) in self.tensors.items():
            registry, name, _ = self.layer.registered[suffix]
            tensor.data.copy_(value)
            registry[name] = tensor


def checkpoint_in_memory(
    tuner: Tuner, name: str, state_dict: Mapping[str, torch.Tensor], config: PeftConfig, prefix: str
) -> Checkpoint:
    """A checkpoint of tensors whose names may have the name of the adapter in them, as in the network.

    Args:
        tuner: the network's.
        name: the adapter's.
        state_dict: the tensors; names may lack what stands before the network's own.
        config: their config.
        prefix: what the names of the method's tensors begin with.
    """
    in_tree = {
        layer.names.in_tree(path, suffix, name): layer.names.key(path, suffix)
        for path, layer in tuner.placed.get(name, {}).items()
        for suffix in layer.registered
    }
    inside = re.compile(rf"(\.{re.escape(prefix)}[^.]*)\.{re.escape(name)}(?=\.|$)")
    names = {}
    for given in state_dict:
        # Of a compiled network; torch puts it there.
        spelled = given.replace("_orig_mod.", "")
        spelled = spelled if spelled.startswith(PREFIX) else format_key(spelled, "").removesuffix(".")
        names[in_tree.get(spelled) or inside.sub(r"\1", spelled)] = given
    return Checkpoint(config, TensorsInMemory(state_dict, "the given state dict"), names)


def make_room(tuner: Tuner, rank: int | None) -> bool:
    """Give all adapters whose layers can be exchanged room up to `rank`, and scales that compiled graphs follow.

    The model computes the same, and the configs say what the layers hold then.

    Args:
        tuner: the network's.
        rank: of the largest adapter to come; None leaves the ranks.

    Returns:
        Whether there is any such layer.

    Raises:
        ValueError: a layer has a higher rank, or cannot have this one; nothing has changed then.
    """
    asked = [(n, config, method_of(config).swapping) for n, config in tuner.peft_config.items()]
    able = [(config, swapping, tuner.placed[n]) for n, config, swapping in asked if swapping is not None]
    for _, swapping, placed in able:
        for path, layer in placed.items():
            why = "" if rank is None else _TIED if layer.leaders else swapping.cannot_grow(layer, rank)
            if why:
                raise ValueError(f"{path}: cannot be given rank {rank}: {why}")
    grown = False
    for config, swapping, placed in able:
        for layer in placed.values():
            grown |= swapping.grow(layer, rank, config)
        vars(config).update(swapping.stated(config, placed))
    return grown
