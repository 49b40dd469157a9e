"""Whether the layers of a checkpoint are all that its config asks for, and the config that asks for exactly these."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, cast

from torch import nn

from splice.config import PeftConfig, TargetRule, copy_config
from splice.errors import PeftError
from splice.kinds.matching import ALL_LINEAR, TargetMatcher, value_for
from splice.kinds.registry import Method, method_of
from splice.loading.config_fields import field_names, field_value
from splice.loading.published.relocating import Move, template
from splice.loading.report import grouped
from splice.loading.targets import resolved_rule, select_parameters


class Cover(NamedTuple):
    """What the config selects and the checkpoint lacks, and the other way round.

    Attributes:
        rule: what the config selects.
        complete: whether the checkpoint is the whole adapter, as far as can be told.
        why_not: a sentence, where it says more than a list of what is missing.
        notes: a line for everything that is taken from the checkpoint's names rather than from the config.
        left_out: those about modules that the config selects and that stay as they are.
    """

    rule: TargetRule
    complete: bool
    why_not: str = ""
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def uncovered(
    method: Method, config: PeftConfig, move: Move, network: nn.Module, modules: Mapping[str, nn.Module]
) -> Cover:
    """Compare the layers of the checkpoint with those that the config selects, under the names it knew.

    A selected module without tensors is a loss, unless the checkpoint has tensors for modules of the same name and for
    none of its kind (the same path with other numbers): then it belongs to a part that the base of its
    training did not have. A layer that is not selected is the adapter's, if the checkpoint has tensors for all of its kind.
    """
    rule = _rule(method, config, network, modules)
    selects, kept = TargetMatcher(rule), set(move.to.values())
    kinds = {template(path) for path in kept}
    # An expression for all linear layers names those of the model at hand, so it is asked under today's paths.
    if str(config.target_rule().target_modules).lower() == ALL_LINEAR:
        selected = {path for path in modules if path and move.reaches(path) and selects(path)}
    else:
        selected = {path for path in modules if path and selects(move.back(path))}
    missing = [path for path in selected - kept if template(path) in kinds]
    names = {path.rpartition(".")[2] for path in move.to}
    lost = missing or [p for p in selected - kept if move.back(p).rpartition(".")[2] not in names]
    added = kept - selected - _owners(rule, modules)
    unnamed = _unnamed(rule, move) if move.said or added else []
    partial = _partly_there(added, kept, modules)
    why_not, notes = "", []
    left_out: tuple[str, ...] = ()
    if partial:
        why_not = (
            f"the checkpoint has tensors for some of {partial[0]!r} and not for others, and the config names none."
        )
    elif unnamed or (lost and not missing):
        shown = ", ".join(map(repr, unnamed)) or _shown(lost)
        why_not = (
            f"the config selects {shown}, and the checkpoint has no tensors for that. If the adapter was trained without, "
            "take it out of target_modules."
        )
    if added:
        notes.append(f"target_modules do not select {_shown(added)}, and the file has its tensors: added")
    if selected - kept:
        shown = _shown(selected - kept)
        left_out = (f"target_modules select {shown}, and the file has nothing for it: left as it is",)
    complete = not (lost or unnamed or partial)
    return Cover(rule, complete, why_not, (*notes, *left_out), left_out)


def _partly_there(added: Collection[str], kept: Collection[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Kinds of layer that the config does not name and that the checkpoint has tensors for some of."""
    kinds = sorted({template(path) for path in modules} & {template(path) for path in added})
    return [kind for kind in kinds if any(template(path) == kind and path not in kept for path in modules)]


def _shown(paths: Iterable[str]) -> str:
    return "; ".join(grouped(sorted(paths))[:3])


def _rule(method: Method, config: PeftConfig, network: nn.Module, modules: Mapping[str, nn.Module]) -> TargetRule:
    try:
        return resolved_rule(method, config, network, modules)
    except (ValueError, PeftError):  # no targets in the config and no default for this model: the file says which
        return config.target_rule()._replace(target_modules=set())


def _unnamed(rule: TargetRule, move: Move) -> list[str]:
    """Names in target_modules that no layer of the checkpoint has: where names differ otherwise, layers may be lost."""
    if rule.target_modules is None or isinstance(rule.target_modules, str):
        return []
    paths = list(move.to)
    return sorted(name for name in rule.target_modules if not any(f".{p}".endswith("." + name) for p in paths))


def _owners(rule: TargetRule, modules: Mapping[str, nn.Module]) -> set[str]:
    return set(select_parameters(rule, modules, {""})) if rule.target_parameters else set()


def explicit(config: PeftConfig, move: Move, modules: Mapping[str, nn.Module], rule: TargetRule) -> PeftConfig:
    """The config that selects the layers of the checkpoint where they are now, with the values it gave them before."""
    targets = sorted(set(move.to.values()) - _owners(rule, modules))
    changes: dict[str, object] = {"target_modules": _shortest(targets, modules, rule)}
    # The paths are spelled out, so whatever narrowed them down before has done its work.
    narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
    changes.update({name: None for name in narrowing if name in field_names(config)})
    for name, default_field in config.pattern_fields.items():
        pattern = _pattern(config, name)
        if pattern:
            default = field_value(config, default_field)
            values = {new: value_for(pattern, old, default) for old, new in move.to.items()}
            changes[name] = {"^" + re.escape(new): value for new, value in values.items() if value != default}
    for name in method_of(config).default_modules:
        names = _matcher(config, name)
        changes[name] = {new for old, new in move.to.items() if names(old)}
    return copy_config(config, **changes)


def _pattern(config: PeftConfig, name: str) -> Mapping[str, object]:
    """The values for single layers in a field that the config's `pattern_fields` name."""
    return cast("Mapping[str, object] | None", field_value(config, name)) or {}


def _matcher(config: PeftConfig, name: str) -> TargetMatcher:
    """What decides whether a field of the config that names modules names one."""
    return TargetMatcher(TargetRule(target_modules=cast("set[str] | str | None", field_value(config, name))))


def _shortest(targets: list[str], modules: Mapping[str, nn.Module], rule: TargetRule) -> set[str]:
    """Last components, where they select the same modules, else whole paths."""
    names = {path.rpartition(".")[2] for path in targets}
    matcher = TargetMatcher(TargetRule(target_modules=names, modules_to_save=rule.modules_to_save))
    return names if {path for path in modules if path and matcher(path)} == set(targets) else set(targets)


def same_values(config: PeftConfig, move: Move) -> bool:
    """Whether the config gives every layer under its new path what it gave it under the old one."""
    for name in config.pattern_fields:
        pattern = _pattern(config, name)
        if any(value_for(pattern, old, None) != value_for(pattern, new, None) for old, new in move.to.items()):
            return False
    for name in method_of(config).default_modules:
        names = _matcher(config, name)
        if any(names(old) != names(new) for old, new in move.to.items()):
            return False
    return True
