"""Putting a new, untrained adapter on a model. The one place where a caller's config is written to: they read it there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from splice.base.bare import walk_bare
from splice.base.foreign_models import name_or_path
from splice.config import PeftConfig
from splice.errors import warn
from splice.kinds.matching import value_for
from splice.kinds.registry import Method, method_named
from splice.loading.commit import build_new
from splice.loading.config_fields import field_value
from splice.loading.laying_out import lay_out
from splice.loading.plan import Plan, write_back
from splice.surgery.coexistence import check_together
from splice.surgery.placement import Built
from splice.surgery.tuner import Tuner


def adopt_base(config: PeftConfig, model: nn.Module, revision: str | None) -> None:
    """Record in `config` which base model, and which revision of it, the adapter is made for."""
    name = name_or_path(model)
    if config.base_model_name_or_path is not None and config.base_model_name_or_path != name:
        warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from {config.base_model_name_or_path!r} to {name!r}. "
            "Please ensure that the correct base model is loaded when loading this checkpoint.",
        )
    config.base_model_name_or_path = name
    if revision is not None:
        if config.revision is not None and config.revision != revision:
            warn(
                f"peft config has already set base model revision to {config.revision}, overwriting with {revision}",
            )
        config.revision = revision


def _warn_of_unmatched_patterns(config: PeftConfig, method: Method, plan: Plan) -> None:
    """Name the keys of `rank_pattern` and its like that match no layer of the adapter: they do nothing."""
    patterns = {name: field_value(config, name) for name in config.pattern_fields}
    if not any(patterns.values()):
        return
    paths = [p.path for p in plan.placements]
    for placement in plan.placements:
        if placement.layer_class is method.parameters_layer:
            paths += [f"{placement.path}.{name}" for name in placement.base._parameters]
    for name, pattern in patterns.items():
        keys = pattern if isinstance(pattern, Mapping) else ()
        unmatched = [key for key in keys if not any(value_for({key: True}, path, False) for path in paths)]
        if unmatched:
            warn(
                f"{name} has keys that match no layer of the adapter: {', '.join(unmatched)}. Layers that they were meant "
                f"for get {config.pattern_fields[name]}={field_value(config, config.pattern_fields[name])}. A key is the end "
                f"of a path, from a dot on, or a regular expression for it; one of the paths is {paths[0]}."
            )


def new_adapter(
    tuner: Tuner, config: PeftConfig, heads: Sequence[str], autocast: bool, low_cpu_mem_usage: bool = False
) -> tuple[Plan, list[Built]]:
    """Build the layers of a new adapter, attached to nothing yet, and write what was resolved into `config`."""
    check_together(tuner, config)
    tuner.stack_layers(config)
    method, modules = method_named(config.peft_type, "the config"), walk_bare(tuner.model)
    meant = method.restated(config, tuner.model, modules)
    plan = lay_out(tuner.model, meant, method, heads, modules, new=True)
    if meant is config:  # else the keys may name layers that were joined since
        _warn_of_unmatched_patterns(config, method, plan)
    for name, value in vars(meant).items() if meant is not config else ():
        setattr(config, name, value)
    write_back(config, plan)
    return plan, build_new(plan, config, autocast, on_meta=low_cpu_mem_usage)
