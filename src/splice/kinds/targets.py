"""Which layers a config selects on a network. A selection is a new value; the config is never changed here."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from splice.base.bare import walk_bare
from splice.base.embeddings import output_embeddings_path
from splice.base.foreign_models import is_pretrained, model_type
from splice.base.layers import LayerKind, kind_of
from splice.checkpoint.types import TaskType
from splice.config import PeftConfig, TargetRule
from splice.errors import NoMatchingPeftModuleError
from splice.kinds.matching import ALL_LINEAR, TargetMatcher
from splice.kinds.registry import Method, method_of

# What a config has in `target_modules` where no module is meant, and not the default either.
NO_TARGETS = "dummy-target-modules"


def targets_of(config: PeftConfig, network: nn.Module) -> dict[str, nn.Module]:
    """The layers of `network` that `config` selects, by path, in the order of the model.

    Raises:
        ValueError: the config names no targets and there are no defaults for this `model_type`.
        NoMatchingPeftModuleError: there is none.
    """
    modules = walk_bare(network)
    return select(resolved_rule(method_of(config), config, network, modules), modules)


def resolved_rule(
    method: Method, config: PeftConfig, network: nn.Module, modules: Mapping[str, nn.Module]
) -> TargetRule:
    """The rule of `config` with default targets filled in and "all-linear" spelled out.

    Raises:
        ValueError: the config names no targets and there are no defaults for this `model_type`.
    """
    rule = config.target_rule()
    if rule.target_modules is None and (method.layers or method.other_layer is not None):
        known_as = model_type(network)
        if known_as not in method.default_targets:
            if method.find_targets is not None:
                return rule._replace(target_modules=method.find_targets(network, modules))
            if rule.target_parameters:
                return rule
            raise ValueError(
                f"Please specify `target_modules` in `peft_config`: {method.name.value} has no default for "
                f"model_type {known_as!r}."
            )
        targets = method.default_targets[known_as]
        return rule._replace(target_modules=targets if isinstance(targets, str) else set(targets))
    if isinstance(rule.target_modules, str) and rule.target_modules.lower() == ALL_LINEAR:
        return rule._replace(target_modules=_all_linear(config, network, modules))
    return rule


def _all_linear(config: PeftConfig, network: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    kinds = (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR)
    names = {path for path, module in modules.items() if kind_of(module) in kinds}
    head = output_embeddings_path(network, modules) if is_pretrained(network) else ""
    # The output layer is left out: it is far larger than the others, and the reference leaves it out too.
    if head:
        return names - {head}
    if config.task_type == TaskType.SEQ_CLS:
        last = {path.rpartition(".")[2] for path in names}
        head_name = next((name for name in ("score", "classifier") if name in last), None)
        names = {path for path in names if path.rpartition(".")[2] != head_name}
    return names


def select(rule: TargetRule, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that `rule` selects, in the order of the model.

    Raises:
        NoMatchingPeftModuleError: there is none, and the message says why.
        ValueError: there are fewer than the rule says.
    """
    if rule.target_modules == NO_TARGETS:
        return {}
    matcher = TargetMatcher(rule)
    selected = {path: module for path, module in modules.items() if path and matcher.is_selected(path)}
    kept = {path: module for path, module in selected.items() if not matcher.is_excluded(path)}
    # Nothing selected and everything excluded are different mistakes, and the message tells them apart.
    if not kept and not rule.target_parameters:
        raise NoMatchingPeftModuleError(_nothing_matched(rule, bool(selected)))
    if rule.last is None:
        return kept
    if rule.last > len(kept):
        raise ValueError(
            f"Config specifies more adapter layers '{rule.last}' than the model has '{len(kept)}': {', '.join(kept)}."
        )
    return dict(list(kept.items())[len(kept) - rule.last :])


def _nothing_matched(rule: TargetRule, all_excluded: bool) -> str:
    if all_excluded:
        return (
            "No modules were targeted for adaptation. All modules were excluded: every module that `target_modules` selects "
            "is also named in `exclude_modules` "
            f"({rule.exclude_modules}) or `modules_to_save` ({rule.modules_to_save}). Check these three fields."
        )
    if not rule.target_modules:
        return "No `target_modules` passed but also no `target_parameters` found: there is nothing to adapt."
    named = rule.target_modules if isinstance(rule.target_modules, str) else sorted(rule.target_modules)
    text = f"Target modules {named} not found in the base model. Please check the target modules and try again."
    if rule.layers_to_transform is not None:
        text += f" Note: You specified 'layers_to_transform': {rule.layers_to_transform}."
    if rule.layers_pattern is not None:
        text += f" Note: You specified 'layers_pattern': {rule.layers_pattern}."
    if rule.modules_to_save:
        text += f" Modules below `modules_to_save` ({rule.modules_to_save}) are saved whole and never targets."
    return text
