"""Which modules a config selects. A selection is a new value; the config is never changed here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from splice.base.asking import asked
from splice.base.conversions import is_pretrained
from splice.base.layers import LayerKind, kind_of
from splice.config import PeftConfig, TargetRule, TaskType
from splice.errors import NoMatchingPeftModuleError
from splice.kinds.registry import Method

ALL_LINEAR = "all-linear"
NO_TARGETS = "dummy-target-modules"


def value_for(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first key of `pattern` that matches the module at `path`, else `default`.

    A key is a regular expression for the end of the path, from a dot on; `^` anchors it to the whole path.
    """
    for key, value in pattern.items():
        if _tail_pattern(key).match(path):
            return value
    return default


@lru_cache(maxsize=1024)
def _tail_pattern(key: str) -> re.Pattern[str]:
    return expression(rf"(.*\.)?({key})$", key, "a pattern of ranks or alphas")


def expression(text: str, given: str, what: str) -> re.Pattern[str]:
    """`text` as a regular expression, made of what the config has.

    Raises:
        ValueError: `given`, in `what`, is none.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{given!r}, in {what} of the config, is no regular expression: {error}") from error


class TargetMatcher:
    """Decides for one module path after the other whether a rule selects it.

    Lists of names are looked up by the last component of a path, so that a decision costs the same for two names
    as for six hundred.
    """

    def __init__(self, rule: TargetRule) -> None:
        self.rule = rule
        self.selects = _name_test(rule.target_modules)
        self.excludes = _name_test(rule.exclude_modules)
        self.saved = [
            expression(rf"(^|.*\.){entry}($|\..*)", entry, "modules_to_save") for entry in rule.modules_to_save or ()
        ]
        layers = rule.layers_to_transform
        self.layers = {layers} if isinstance(layers, int) else set(layers or ())
        patterns = [rule.layers_pattern] if isinstance(rule.layers_pattern, str) else rule.layers_pattern or []
        self.layer_index = [
            expression(rf"(^|.*?\.){p}\.(?P<index>\d+)\.", p, "layers_pattern") for p in patterns if p
        ] or [re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")]

    def is_excluded(self, path: str) -> bool:
        return self.excludes(path) or any(pattern.match(path) for pattern in self.saved)

    def is_selected(self, path: str) -> bool:
        if not self.selects(path):
            return False
        named_in_full = not isinstance(self.rule.target_modules, str) and path in (self.rule.target_modules or ())
        return not self.layers or named_in_full or self._layer_is_selected(path)

    def __call__(self, path: str) -> bool:
        return self.is_selected(path) and not self.is_excluded(path)

    def _layer_is_selected(self, path: str) -> bool:
        found = next((m for m in (pattern.match(path) for pattern in self.layer_index) if m), None)
        return found is not None and int(found["index"]) in self.layers


def _name_test(names: Iterable[str] | str | None) -> Any:
    if names is None:
        return lambda path: False
    if isinstance(names, str):
        full_match = expression(names, names, "target_modules or exclude_modules").fullmatch
        return lambda path: full_match(path) is not None
    by_last: dict[str, list[str]] = {}
    for name in names:
        by_last.setdefault(name.rpartition(".")[2], []).append(name)

    def matches(path: str) -> bool:
        entries = by_last.get(path.rpartition(".")[2], ())
        return any(path == entry or path.endswith("." + entry) for entry in entries)

    return matches


def resolved_rule(
    method: Method, config: PeftConfig, network: nn.Module, modules: Mapping[str, nn.Module]
) -> TargetRule:
    """The rule of `config` with default targets filled in and "all-linear" spelled out.

    Raises:
        ValueError: the config names no targets and there are no defaults for this `model_type`.
    """
    import dataclasses

    rule = config.target_rule()
    if rule.target_modules is None and method.layers:
        model_type = model_type_of(network)
        if model_type not in method.default_targets:
            if method.find_targets is not None:
                return dataclasses.replace(rule, target_modules=method.find_targets(network, modules))
            if rule.target_parameters:
                return rule
            raise ValueError(
                f"Please specify `target_modules` in `peft_config`: {method.name.value} has no default for "
                f"model_type {model_type!r}."
            )
        targets = method.default_targets[model_type]
        return dataclasses.replace(rule, target_modules=targets if isinstance(targets, str) else set(targets))
    if isinstance(rule.target_modules, str) and rule.target_modules.lower() == ALL_LINEAR:
        return dataclasses.replace(rule, target_modules=_all_linear(config, network, modules))
    return rule


def default_modules(method: Method, config: PeftConfig, network: nn.Module) -> dict[str, Any]:
    """Default values for the other fields that name modules, where `config` leaves them open.

    Raises:
        ValueError: there are no defaults for this `model_type`.
    """
    model_type, found = model_type_of(network), {}
    for name, defaults in method.default_modules.items():
        if getattr(config, name) is not None:
            continue
        if model_type not in defaults:
            raise ValueError(
                f"Please specify `{name}` in `peft_config`: {method.name.value} has no default for model_type "
                f"{model_type!r}. An empty list means none."
            )
        found[name] = set(defaults[model_type])
    return found


def model_type_of(network: nn.Module) -> str:
    """`config.model_type` of a transformers model, "custom" for any other."""
    config = network.__dict__.get("config")
    if isinstance(config, dict):
        return str(config.get("model_type", "custom"))
    return str(asked(config, "model_type", "custom"))


def _all_linear(config: PeftConfig, network: Any, modules: Mapping[str, nn.Module]) -> set[str]:
    kinds = (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR)
    names = {path for path, module in modules.items() if kind_of(module) in kinds}
    head = network.get_output_embeddings() if is_pretrained(network) else None
    if head is not None:
        return {path for path in names if modules[path] is not head}
    if config.task_type == TaskType.SEQ_CLS:
        last = {path.rpartition(".")[2] for path in names}
        head_name = next((name for name in ("score", "classifier") if name in last), None)
        names = {path for path in names if path.rpartition(".")[2] != head_name}
    return names


def select(rule: TargetRule, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that `rule` selects, in the order of the model.

    Raises:
        NoMatchingPeftModuleError: there is none, and the message says why.
    """
    if rule.target_modules == NO_TARGETS:
        return {}
    matcher = TargetMatcher(rule)
    selected = {path: module for path, module in modules.items() if path and matcher.is_selected(path)}
    kept = {path: module for path, module in selected.items() if not matcher.is_excluded(path)}
    if not kept and not rule.target_parameters:
        raise NoMatchingPeftModuleError(_nothing_matched(rule, bool(selected)))
    return kept


def select_parameters(rule: TargetRule, modules: Mapping[str, nn.Module], adapted: Mapping[str, Any]) -> list[str]:
    """Paths of the modules that own a parameter which `rule` selects, in the order of the model.

    Raises:
        NoMatchingPeftModuleError: neither a module nor a parameter is selected.
        ValueError: a selected parameter is on the model itself, or on a module that is a target as a whole.
    """
    entries = rule.target_parameters or []
    found = [path for path, module in modules.items() if matching_parameters(module, path, entries)]
    for path in found:
        if not path:
            raise ValueError(
                "target_parameters: a parameter of the model itself, outside of any module, cannot be adapted"
            )
        if path in adapted:
            raise ValueError(
                f"{path!r} is selected by target_modules and one of its parameters by target_parameters. Choose one; "
                "pass `target_modules=[]` to keep the default targets out."
            )
    if entries and not found and not adapted:
        raise NoMatchingPeftModuleError(f"Target parameters {sorted(entries)} not found in the base model.")
    return found


def matching_parameters(module: nn.Module, path: str, entries: Iterable[str]) -> list[str]:
    """Names of the parameters registered on `module` itself that `entries` select, in the order of registration."""
    tails = tuple("." + entry for entry in entries)
    full = [
        (name, f".{path}.{name}" if path else f".{name}") for name, p in module._parameters.items() if p is not None
    ]
    return [name for name, spelled in full if tails and spelled.endswith(tails)]


def _nothing_matched(rule: TargetRule, all_excluded: bool) -> str:
    if all_excluded:
        return (
            "All modules were excluded: every module that `target_modules` selects is also named in `exclude_modules` "
            f"({rule.exclude_modules}) or `modules_to_save` ({rule.modules_to_save}). Check these three fields."
        )
    if not rule.target_modules:
        return "No `target_modules` passed and no `target_parameters` either: there is nothing to adapt."
    named = rule.target_modules if isinstance(rule.target_modules, str) else sorted(rule.target_modules)
    text = f"Target modules {named} not found in the base model. Please check the target modules and try again."
    if rule.layers_to_transform is not None:
        text += f" Note: `layers_to_transform` is {rule.layers_to_transform}."
    if rule.layers_pattern is not None:
        text += f" Note: `layers_pattern` is {rule.layers_pattern}."
    if rule.modules_to_save:
        text += f" Modules below `modules_to_save` ({rule.modules_to_save}) are saved whole and never targets."
    return text
