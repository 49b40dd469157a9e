"""Putting a new, untrained adapter on a model. The one place where a caller's config is written to: they read it there."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import nn

from splice.base.bare import walk_bare
from splice.base.foreign_models import name_or_path
from splice.config import PeftConfig
from splice.errors import warn
from splice.kinds.registry import method_named
from splice.loading.commit import build_new
from splice.loading.laying_out import lay_out
from splice.loading.load import load_experts
from splice.loading.options import LoadOptions
from splice.loading.patterns import paths_for_patterns, unmatched
from splice.loading.plan import Plan, write_back
from splice.surgery.coexistence import check_together
from splice.surgery.placement import Built
from splice.surgery.tuner import Tuner
from splice.surgery.undo import Undo


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


def new_adapter(
    tuner: Tuner, config: PeftConfig, heads: Sequence[str], autocast: bool, low_cpu_mem_usage: bool = False
) -> tuple[Plan, list[Built]]:
    """Build the layers of a new adapter, attached to nothing yet, and write what was resolved into `config`."""
    if method_named(config.peft_type, "the config").experts is not None:
        options = LoadOptions("", False, autocast, False, None, True, {}, time.perf_counter())
        load_experts(tuner, config, options, Undo(tuner))
    check_together(tuner, config)
    tuner.stack_layers(config)
    method, modules = method_named(config.peft_type, "the config"), walk_bare(tuner.model)
    meant = method.restated(config, tuner.model, modules)
    plan = lay_out(tuner.model, meant, method, heads, modules, new=True)
    if meant is config:  # else the keys may name layers that were joined since
        for line in unmatched(config, paths_for_patterns(plan, method), config.pattern_fields):
            warn(line)
    for name, value in vars(meant).items() if meant is not config else ():
        setattr(config, name, value)
    write_back(config, plan)
    return plan, build_new(plan, config, autocast, on_meta=low_cpu_mem_usage)
