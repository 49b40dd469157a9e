"""The plan: where every tensor of a checkpoint goes in a given model, and everything that does not fit.

Making a plan reads no tensor, allocates nothing and changes nothing; it works on a model on the `meta` device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from splice.base.bare import walk_bare
from splice.checkpoint.header import Entry
from splice.checkpoint.keys import format_key
from splice.checkpoint.tensors import DTYPES
from splice.config import PeftConfig, TargetRule, copy_config
from splice.errors import UnsupportedLayerError
from splice.kinds.module_copy import SavedModule
from splice.kinds.names import BIAS
from splice.kinds.network import NetworkLayer
from splice.kinds.reading import Checkpoint
from splice.kinds.registry import Method
from splice.kinds.trained_bias import BiasOnly, bias_slot
from splice.loading.targets import default_modules, resolved_rule, select, select_parameters
from splice.loading.tying import EMBEDDING_NAMES, Repeated, followers, repeated_keys, token_rows, tying
from splice.surgery.placement import Placement


@dataclass
class Plan:
    """What a load will do.

    Attributes:
        placements: the adapter layers to build, in the order of the model.
        rule: the rule they were selected by, with defaults and "all-linear" spelled out.
        resolved: fields that the config leaves open, filled in.
        base_copies: keys under which a checkpoint repeats weights of the base, and those weights.
        redundant: names that the reference writes a second time, and that nothing has to be done with.
        followers: adapter layers that share the tensors of others, which `placements` hold.
        repeated: keys under which a checkpoint may hold a follower's tensors, and those of the tensors they share.
        sources: key of a slot -> name of the tensor in the checkpoint, for every tensor that has its place.
        missing: keys of slots that the checkpoint has no tensor for.
        unexpected: names of tensors that have no place.
        mismatched: (key, shape or dtype in the checkpoint, shape it must have) of tensors that do not fit.
        hints: why the checkpoint could not be read in another way, where one was near.
    """

    placements: list[Placement]
    rule: TargetRule
    resolved: dict[str, Any] = field(default_factory=dict)
    redundant: frozenset[str] = frozenset()
    base_copies: dict[str, torch.Tensor] = field(default_factory=dict)
    followers: list[Placement] = field(default_factory=list)
    repeated: dict[str, Repeated] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, str, str]] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def slots(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(key, shape) of every tensor that the adapter has."""
        for placement in self.placements:
            for suffix, slot in placement.slots.items():
                yield placement.key(suffix), slot.shape


def lay_out(
    network: nn.Module,
    config: PeftConfig,
    method: Method,
    heads: Sequence[str] = (),
    modules: Mapping[str, nn.Module] | None = None,
    new: bool = False,
) -> Plan:
    """The adapter layers that `config` asks for on `network`: the plan of a new, still empty adapter.

    Args:
        network: the base model; it may carry adapters.
        config: the adapter's config.
        method: the method of the config.
        heads: names of task heads, which are saved whole beside what the config names.
        modules: all modules of `network` by path, where the caller has them already.
        new: the adapter is made and not loaded; some methods train more tensors than their checkpoints hold.

    Raises:
        NoMatchingPeftModuleError: the config selects nothing.
        ValueError: the config cannot be applied to a layer that it selects.
    """
    method.check(config)
    if modules is None:
        modules = walk_bare(network)
    if method.network_layer is not None:
        return _lay_out_prompt(network, config, method.network_layer, heads, modules, new)
    rule = _with_heads(resolved_rule(method, config, network, modules), heads)
    further = default_modules(method, config, network)
    config = copy_config(config, **further) if further else config
    tied = tying(rule, config, network, modules, new)
    rule = tied.rule
    selected = {path: base for path, base in select(rule, modules).items() if path not in tied.left_out}
    placements = _on_targets(selected, method, config)
    if method.shared is not None and placements:
        slots = method.shared.shared_slots([(p.path, p.base) for p in placements], config)
        # On the device of one of the layers, and in its precision: the last one's, as in the reference.
        placements.insert(0, Placement("", placements[-1].base, method.shared, slots))
    if rule.target_parameters and method.parameters_layer is not None:
        adapted = {p.path: p for p in placements}
        owners = select_parameters(rule, modules, adapted)
        placements += [Placement.of(path, modules[path], method.parameters_layer, config) for path in owners]
    whole = _saved_whole(rule, modules)
    _check_apart(whole, placements)
    placements += [Placement.of(path, base, SavedModule, config) for path, base in whole]
    placements += token_rows(config, tied.embeddings, modules, placements)
    following = followers(tied, method, config, placements, modules)
    biases = config.trained_biases()
    named = {"target_modules": rule.target_modules, "modules_to_save": rule.modules_to_save}
    resolved: dict[str, Any] = {**named, **further}
    for placement in placements:
        resolved.update(placement.layer_class.resolved(placement.base, config))
    placements = _with_biases(placements, modules, biases)
    plan = Plan(placements, rule, resolved, _written_twice(placements, biases), _base_copies(placements))
    plan.followers, plan.repeated = following, repeated_keys(following, placements)
    return plan


def _on_targets(selected: Mapping[str, nn.Module], method: Method, config: PeftConfig) -> list[Placement]:
    placements = []
    for path, base in selected.items():
        layer_class = method.layer_for(base, path, config)
        placements.append(Placement.of(path, base, layer_class, config))
        for below, companion in layer_class.companions(base, path).items():
            if below in selected:
                raise UnsupportedLayerError(
                    f"{below!r} is selected, and so is {path!r}, which adapts it along with itself. Exclude one of them "
                    "with `exclude_modules`."
                )
            placements.append(Placement.of(below, base.get_submodule(below[len(path) + 1 :]), companion, config))
    return placements


def _with_heads(rule: TargetRule, heads: Sequence[str]) -> TargetRule:
    saved = list(dict.fromkeys([*(rule.modules_to_save or ()), *heads]))
    return replace(rule, modules_to_save=saved) if heads else rule


def _lay_out_prompt(
    network: nn.Module,
    config: PeftConfig,
    layer_class: type[NetworkLayer],
    heads: Sequence[str],
    modules: Mapping[str, nn.Module],
    new: bool,
) -> Plan:
    """As `lay_out`, of methods that act on the call of the network as a whole."""
    rule = _with_heads(config.target_rule(), heads)
    path = layer_class.place(network, config)
    if new and not config.inference_mode:
        layer_class = layer_class.for_training(config)
    prompt = Placement.of(path, modules[path], layer_class, config)
    whole = _saved_whole(rule, modules)
    _check_apart(whole, [prompt])
    placements = [prompt, *(Placement.of(path, base, layer_class.head, config) for path, base in whole)]
    resolved = {**layer_class.resolved(network, config), "modules_to_save": rule.modules_to_save}
    return Plan(placements, rule, resolved)


def _base_copies(placements: Sequence[Placement]) -> dict[str, torch.Tensor]:
    """Where embeddings are targets, a checkpoint may hold the base's own embeddings beside the adapter."""
    found: dict[str, torch.Tensor] = {}
    for placement in placements:
        weight = placement.base._parameters.get("weight")
        if placement.path.rpartition(".")[2] in EMBEDDING_NAMES and weight is not None:
            found[format_key(placement.path, "base_layer.weight")] = weight
    return found


def _written_twice(placements: Sequence[Placement], biases: str) -> frozenset[str]:
    """With `bias="all"` the reference also writes the biases of whole modules under their names in its memory."""
    if biases != "all":
        return frozenset()
    whole = [(p.path, suffix) for p in placements if p.layer_class is SavedModule for suffix in p.slots]
    return frozenset(
        format_key(path, f"{where}.{suffix}")
        for path, suffix in whole
        if suffix.rpartition(".")[2] == "bias"
        for where in ("modules_to_save", "original_module")
    )


def _saved_whole(rule: TargetRule, modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    entries = tuple(rule.modules_to_save or ())
    found: list[tuple[str, nn.Module]] = []
    for path, module in modules.items() if entries else ():
        # The reference compares plain suffixes here, without regard to dots.
        inside = found and path.startswith(found[-1][0] + ".")
        if path and path.endswith(entries) and not inside:
            found.append((path, module))
    return found


def _check_apart(whole: Sequence[tuple[str, nn.Module]], targets: Sequence[Placement]) -> None:
    """A module that is saved whole cannot be, or hold, a target of the same adapter."""
    for path, module in whole:
        inside = [p.path for p in targets if p.path == path or p.path.startswith(path + ".")]
        if inside:
            raise TypeError(
                f"modules_to_save cannot be applied to {path!r} (a {type(module).__name__}): {inside[0]!r} is a target of "
                "the same adapter. Its names are plain suffixes; write them out as far as they are meant."
            )


def _with_biases(placements: list[Placement], modules: Mapping[str, nn.Module], bias: str) -> list[Placement]:
    """`placements` with a slot for every bias that the adapter trains."""
    if bias == "none":
        return placements
    whole = tuple(p.path for p in placements if p.layer_class is SavedModule)
    adapted = {p.path: p for p in placements}
    result = []
    for path, module in modules.items():
        placement = adapted.get(path)
        own = module._parameters.get("bias")
        inside_whole = any(path == w or path.startswith(w + ".") for w in whole)
        if own is None or inside_whole:
            if placement is not None:
                result.append(placement)
        elif placement is not None:
            result.append(replace(placement, slots={**placement.slots, BIAS: bias_slot(module)}))
        elif bias == "all":
            result.append(Placement.of(path, module, BiasOnly, PeftConfig()))
    return result


def fit(plan: Plan, entries: Mapping[str, Entry]) -> Plan:
    """Fill in where each tensor of the checkpoint goes, and list what does not fit."""
    taken, made_again = set(), set()
    for placement in plan.placements:
        keys = placement.keys
        for suffix, slot in placement.slots.items():
            key, shape = keys[suffix], slot.shape
            if not slot.stored:  # made again from the config, and not read even if it is there
                made_again.add(key)
                continue
            entry = entries.get(key)
            taken.add(key)
            if entry is None:
                plan.missing.append(key)
            elif entry.shape != shape:
                plan.mismatched.append((key, _shape_text(entry.shape), _shape_text(shape)))
            elif not _is_floating(entry.dtype) and placement.dtype(suffix, False).is_floating_point:
                plan.mismatched.append((key, f"dtype {entry.dtype}", "a floating-point dtype"))
            else:
                plan.sources[key] = key
    plan.base_copies = {key: weight for key, weight in plan.base_copies.items() if key in entries}
    for key, weight in plan.base_copies.items():
        if entries[key].shape != tuple(weight.shape):
            plan.mismatched.append((key, _shape_text(entries[key].shape), _shape_text(weight.shape)))
    plan.repeated = {key: of for key, of in plan.repeated.items() if key in entries}
    for key, of in plan.repeated.items():
        shape = entries[key].shape[::-1] if of.transposed else entries[key].shape
        if of.key in plan.sources and shape != entries[of.key].shape:
            plan.mismatched.append((key, _shape_text(entries[key].shape), f"that of {of.key}"))
    known = made_again | taken | plan.redundant | plan.base_copies.keys() | plan.repeated.keys()
    plan.unexpected = [name for name in entries if name not in known]
    return plan


def _shape_text(shape: Sequence[int]) -> str:
    return str(tuple(shape)).replace(" ", "")


def _is_floating(dtype: str) -> bool:
    known: Any = DTYPES.get(dtype)
    return known is not None and bool(known.is_floating_point)


def write_back(config: PeftConfig, plan: Plan) -> None:
    """What the config left open is filled in, as users of the reference read it: default targets, "all-linear", heads."""
    for name, value in plan.resolved.items():
        # Heads of a task are saved whole also by methods whose configs cannot say so.
        if value is not None and name in vars(config) and value != getattr(config, name):
            setattr(config, name, value)


@dataclass
class Fitted:
    """A plan, the checkpoint and the config that it is for, and what was read in another way than it is written."""

    plan: Plan
    checkpoint: Checkpoint
    config: PeftConfig
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
