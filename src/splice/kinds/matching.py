"""Which paths a rule or a pattern of a config names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import nn

from splice.checkpoint.patterns import expression as expression  # where methods look for it
from splice.checkpoint.patterns import value_behind_dot as value_behind_dot
from splice.checkpoint.patterns import value_for as value_for
from splice.config import TargetRule

ALL_LINEAR = "all-linear"


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


def _name_test(names: Iterable[str] | str | None) -> Callable[[str], bool]:
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


def matching_parameters(module: nn.Module, path: str, entries: Iterable[str]) -> list[str]:
    """Names of the parameters registered on `module` itself that `entries` select, in the order of registration."""
    tails = tuple("." + entry for entry in entries)
    full = [
        (name, f".{path}.{name}" if path else f".{name}") for name, p in module._parameters.items() if p is not None
    ]
    return [name for name, spelled in full if tails and spelled.endswith(tails)]
