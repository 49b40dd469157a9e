"""Values for single layers, by patterns of their paths (`rank_pattern`, `alpha_pattern`...): which layers they can mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from splice.config import PeftConfig
from splice.kinds.matching import value_for
from splice.kinds.module_copy import WholeModule
from splice.kinds.registry import Method
from splice.kinds.shared import SharedTensors
from splice.kinds.trained_bias import BiasOnly
from splice.loading.config_fields import field_value
from splice.loading.plan import Plan

# Layers of an adapter for which no method has values of their own.
_WITHOUT = (WholeModule, SharedTensors, BiasOnly)


def paths_for_patterns(plan: Plan, method: Method) -> list[str]:
    """The paths that patterns are matched with: of layers, and of parameters where these are adapted one by one."""
    own = [p for p in plan.placements if not issubclass(p.layer_class, _WITHOUT) and p.own_config is None]
    layers = [p.path for p in own if p.layer_class is not method.parameters_layer]
    owners = [p for p in own if p.layer_class is method.parameters_layer]
    return layers + [f"{owner.path}.{name}" for owner in owners for name in owner.base._parameters]


def unmatched(config: PeftConfig, paths: Sequence[str], fields: Collection[str]) -> list[str]:
    """A line for each of these fields with keys that match none of the paths: such keys do nothing."""
    lines = []
    for name, pattern in ((name, field_value(config, name)) for name in config.pattern_fields if name in fields):
        keys = pattern if isinstance(pattern, Mapping) else ()
        lost = [key for key in keys if not any(value_for({key: True}, path, False) for path in paths)]
        if lost and paths:
            other = config.pattern_fields[name]
            lines.append(
                f"{name} has keys that match no layer of the adapter: {', '.join(lost)}. Layers that they were meant for get "
                f"{other}={field_value(config, other)}. A key is the end of a path, from a dot on, or a regular expression "
                f"for it; one of the paths is {paths[0]}."
            )
    return lines
