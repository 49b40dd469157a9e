"""What a config selects beside layers, and what it names among those."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from splice.base.foreign_models import model_type
from splice.config import PeftConfig, TargetRule
from splice.errors import NoMatchingPeftModuleError, warn
from splice.kinds.matching import TargetMatcher, matching_parameters
from splice.kinds.registry import Method
from splice.kinds.targets import NO_TARGETS
from splice.kinds.targets import resolved_rule as resolved_rule
from splice.kinds.targets import select as select
from splice.loading.config_fields import field_value


def default_modules(method: Method, config: PeftConfig, network: nn.Module) -> dict[str, set[str]]:
    """Default values for the other fields that name modules, where `config` leaves them open.

    Raises:
        ValueError: there are no defaults for this `model_type`.
    """
    known_as, found = model_type(network), {}
    for name, defaults in method.default_modules.items():
        if field_value(config, name) is not None:
            continue
        if known_as not in defaults:
            raise ValueError(
                f"Please specify `{name}` in `peft_config`: {method.name.value} has no default for model_type "
                f"{known_as!r}. An empty list means none."
            )
        found[name] = set(defaults[known_as])
    return found


def among_targets(
    method: Method, config: PeftConfig, found: Mapping[str, set[str]], targets: Collection[str] | str | None
) -> dict[str, set[str]]:
    """The fields that name some of the targets, by the names that the targets have now: a save writes both.

    Args:
        method: the adapter's.
        config: the adapter's, whose targets were spelled out.
        found: those fields that the config leaves open.
        targets: as they were spelled out.
    """
    result = dict(found)
    for name in method.default_modules:
        ends = result.get(name, field_value(config, name))
        if isinstance(ends, (set, list)) and not isinstance(targets, str):
            named = {target for target in targets or () if target.endswith(tuple(ends))}
            result[name] = set(ends) if set(ends) <= set(targets or ()) else named
    return result


def select_parameters(rule: TargetRule, modules: Mapping[str, nn.Module], adapted: Collection[str]) -> list[str]:
    """Paths of the modules that own a parameter which `rule` selects, in the order of the model.

    Raises:
        NoMatchingPeftModuleError: neither a module nor a parameter is selected.
        ValueError: a selected parameter is on the model itself, or on a module that is in `adapted`: a target as a whole.
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


def say_what_selects_nothing(rule: TargetRule, modules: Mapping[str, nn.Module], found: Collection[str]) -> None:
    """Warn of each field that names something and selects nothing: a misspelt name is not noticed otherwise.

    Args:
        rule: what a new adapter's config selects; something, or it would have been refused.
        modules: all modules of the network, by path.
        found: paths of the modules that are targets as a whole.
    """
    matcher, entries = TargetMatcher(rule), rule.target_parameters or []
    if rule.exclude_modules and not any(map(matcher.excludes, filter(None, modules))):
        warn(
            f"You have passed exclude_modules={rule.exclude_modules} but no modules were excluded: the names are the ends of "
            "paths, from a dot on, or one regular expression for whole paths."
        )
    if rule.target_modules and rule.target_modules != NO_TARGETS and entries and not found:
        warn(
            f"target_modules={rule.target_modules} were set but no module was matched: the adapter is on the parameters of "
            "`target_parameters` alone.",
            RuntimeWarning,
        )
    if entries and not any(matching_parameters(module, path, entries) for path, module in modules.items()):
        warn(
            f"target_parameters={entries} were set but no parameter was matched: the adapter is on the modules of "
            "`target_modules` alone.",
            RuntimeWarning,
        )
