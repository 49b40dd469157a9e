"""Adapters on a network without a PeftModel around it, as other libraries put them there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

from splice.base.bare import walk_bare
from splice.checkpoint.keys import PREFIX, parse_key
from splice.config import PeftConfig, copy_config
from splice.errors import NoMatchingPeftModuleError, warn
from splice.kinds.matching import TargetMatcher
from splice.kinds.registry import Method, method_named
from splice.loading.creating import new_adapter
from splice.loading.report import grouped
from splice.loading.targets import resolved_rule
from splice.surgery.tuner import Tuner
from splice.surgery.undo import Undo

# What torch.compile puts in front of the names of the module that it wraps; the state_dict may come from a compiled network.
_COMPILED = "_orig_mod."


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, object] | None = None,
) -> nn.Module:
    """Put a new adapter on `model`, make it the active one, and return `model` itself.

    Its configs are in `model.peft_config`. The adapter's tensors are in the base's dtype.

    Args:
        peft_config: what to put on it; resolved values are written into it.
        model: the network; it may carry adapters.
        adapter_name: the adapter's name in memory.
        low_cpu_mem_usage: leave the new tensors on the meta device, to be loaded.
        state_dict: a checkpoint whose names say which layers to adapt, in place of the config. Its values are not used.

    Raises:
        ValueError: the method acts on more than layers, or `state_dict` is given together with `target_parameters`.
        NoMatchingPeftModuleError: nothing is selected.
    """
    method = method_named(peft_config.peft_type, "the config")
    if method.network_layer is not None or method.shared is not None:
        raise ValueError(
            f"{method.name.value} is more than layers, and cannot be injected into a network alone; use `get_peft_model`."
        )
    injected(peft_config, model, adapter_name, low_cpu_mem_usage, state_dict)
    return model


def injected(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str,
    low_cpu_mem_usage: bool,
    state_dict: Mapping[str, object] | None,
    autocast_adapter_dtype: bool = False,
) -> Tuner:
    """As `inject_adapter_in_model`, of any method that is put on layers; the tuner of the network."""
    method = method_named(peft_config.peft_type, "the config")
    tuner = Tuner.of(model)
    tuner.check_new(adapter_name)
    config = peft_config
    if state_dict is not None:
        config = _of_layers(peft_config, method, model, state_dict)
    # The base is frozen with its first adapter only: a trainer that injects a second one may train parts of the base by now.
    first, undo = tuner.is_bare, Undo(tuner)
    try:
        plan, built = new_adapter(tuner, config, (), autocast_adapter_dtype, low_cpu_mem_usage)
        tuner.commit(adapter_name, peft_config, built, freeze_base=first, plan=plan)
        tuner.selection.set([adapter_name])
        tuner.set_requires_grad(adapter_name, not peft_config.inference_mode)
        return tuner
    except BaseException:
        undo.run()
        raise


def _of_layers(config: PeftConfig, method: Method, model: nn.Module, state_dict: Mapping[str, object]) -> PeftConfig:
    """A copy of `config` that selects the layers for which `state_dict` has tensors."""
    rule = config.target_rule()
    if rule.target_parameters:
        raise ValueError("`state_dict` cannot be used together with `target_parameters`")
    modules = walk_bare(model)
    keys = (
        parse_key(PREFIX + name.replace(_COMPILED, "").removeprefix(PREFIX), method.tensor_names) for name in state_dict
    )
    paths = {key.path for key in keys if key is not None} & modules.keys()
    if not paths:
        raise NoMatchingPeftModuleError(
            f"no name in the given state_dict speaks of a layer of this model with tensors of {method.name.value}; "
            f"the first one is {next(iter(state_dict), None)!r}"
        )
    selects = TargetMatcher(resolved_rule(method, config, model, modules))
    selected = {path for path in modules if path and selects(path)}
    if selected != paths:
        more, less = "; ".join(grouped(sorted(paths - selected))), "; ".join(grouped(sorted(selected - paths)))
        warn(
            "The layers that the state_dict speaks of are not those that the config selects; the state_dict decides. "
            f"In the state_dict alone: {more or 'none'}. In the config alone: {less or 'none'}.",
            RuntimeWarning,
        )
    # The paths say all; what else selects layers is taken away, or it would leave out some of them.
    fields = {field.name for field in dataclasses.fields(config)}
    changes = dict.fromkeys(fields & {"exclude_modules", "layers_to_transform", "layers_pattern"})
    return copy_config(config, target_modules=paths, **changes)
