"""Putting a new, untrained adapter on a model. The one place where a caller's config is written to: they read it there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from splice.config import PeftConfig
from splice.kinds.module_copy import walk_bare
from splice.kinds.registry import method_named
from splice.loading.commit import Built, build_new
from splice.loading.plan import Plan, lay_out
from splice.methods.lora.experts import FIELDS, with_stacked_experts
from splice.surgery.tuner import Tuner


def adopt_base(config: PeftConfig, model: nn.Module, revision: str | None) -> None:
    """Record in `config` which base model, and which revision of it, the adapter is made for."""
    name = model.__dict__.get("name_or_path") or None
    if config.base_model_name_or_path is not None and config.base_model_name_or_path != name:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from {config.base_model_name_or_path!r} to {name!r}. "
            "Please ensure that the correct base model is loaded when loading this checkpoint.",
            stacklevel=3,
        )
    config.base_model_name_or_path = name
    if revision is not None:
        if config.revision is not None and config.revision != revision:
            warnings.warn(
                f"peft config has already set base model revision to {config.revision}, overwriting with {revision}",
                stacklevel=3,
            )
        config.revision = revision


def check_mixed(config: PeftConfig) -> None:
    """Raise where an adapter with this config cannot stand beside those of other methods.

    Raises:
        ValueError: it is no adapter of layers.
    """
    method = method_named(config.peft_type, "the config")
    if method.network_layer is not None:
        raise ValueError(
            f"{method.name.value} acts on the call of the whole network, and cannot be mixed with adapters of other methods."
        )


def new_adapter(
    tuner: Tuner, config: PeftConfig, heads: Sequence[str], autocast: bool, low_cpu_mem_usage: bool = False
) -> tuple[Plan, list[Built]]:
    """Build the layers of a new adapter, attached to nothing yet, and write what was resolved into `config`."""
    check_together(tuner, config)
    tuner.stack_layers(config)
    method, modules = method_named(config.peft_type, "the config"), walk_bare(tuner.model)
    meant = with_stacked_experts(config, tuner.model, modules, method)
    plan = lay_out(tuner.model, meant, method, heads, modules, new=True)
    if meant is not config:
        for name in FIELDS:
            setattr(config, name, getattr(meant, name))
    write_back(config, plan)
    return plan, build_new(plan, config, autocast, on_meta=low_cpu_mem_usage)


def write_back(config: PeftConfig, plan: Plan) -> None:
    """What the config left open is filled in, as users of the reference read it: default targets, "all-linear", heads."""
    for name, value in plan.resolved.items():
        # Heads of a task are saved whole also by methods whose configs cannot say so.
        if value is not None and name in vars(config) and value != getattr(config, name):
            setattr(config, name, value)


def check_together(tuner: Tuner, config: PeftConfig) -> None:
    """Raise where an adapter with this config cannot stand beside those that are there.

    Raises:
        ValueError: another method, a second adapter that trains biases of the base, or what the method's own rule refuses.
    """
    new = config.trained_biases()
    if tuner.mixes_methods:
        check_mixed(config)
    for name, other in tuner.peft_config.items():
        if other.peft_type != config.peft_type and not tuner.mixes_methods:
            raise ValueError(
                f"Cannot combine adapters with different peft types: {name!r} is {other.peft_type} and the new one is "
                f"{config.peft_type}."
            )
        if new != "none" and other.trained_biases() != "none":
            raise ValueError(
                f"only one adapter of a model can train biases: {name!r} has bias={other.trained_biases()!r} and the new "
                f"one {new!r}. When using multiple adapters, set bias to 'none' for all adapters but one."
            )
    if tuner.peft_config and not tuner.mixes_methods:
        own_rule = tuner.method.check_beside
        if own_rule is not None:
            own_rule(config, tuner.peft_config)
