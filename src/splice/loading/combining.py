"""Several adapters combined into one new adapter, in the way that their method's record has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch

from splice.config import PeftConfig, copy_config
from splice.errors import UnsupportedFeatureError
from splice.kinds.combining import Combination, Combine
from splice.kinds.layer import AdapterLayer
from splice.kinds.module_copy import WholeModule
from splice.kinds.registry import Method, method_of
from splice.loading.config_fields import field_names, field_value
from splice.loading.laying_out import plan_of_layers
from splice.surgery.placement import Built, Placement
from splice.surgery.tuner import Tuner


@torch.no_grad()
def add_weighted_adapter(
    tuner: Tuner, adapters: Sequence[str], weights: Sequence[float], name: str, combination: Combination
) -> None:
    """Add the combination as a new adapter, frozen and not active.

    A name that is taken is a silent no-op, as in the reference.

    Raises:
        ValueError: an adapter is unknown, the combination is, or the adapters cannot be combined that way.
        UnsupportedFeatureError: adapters of their method have no sum.
    """
    if name in tuner.peft_config:  # scripts of the reference call it again and again
        return
    tuner.check_new(name)
    method = _method_of(tuner, adapters, weights)
    combine = method.combine
    if combine is None:
        raise UnsupportedFeatureError(f"adapters of {method.name.value} cannot be combined into a new one")
    # Of one adapter every combination is the adapter itself, by its weight; but the caller's choice is checked first.
    combine.check(combination, method.name.value)
    if len(adapters) == 1:
        combination = Combination("linear")
    _check_layers(tuner, adapters)
    configs = {adapter: tuner.peft_config[adapter] for adapter in adapters}
    united = _united(tuner, configs, method)
    if len(adapters) == 1 and weights[0] == 1 and combine.copies(united):
        config, built = (
            united,
            [_copied(tuner, path, united, layer) for path, layer in tuner.placed[adapters[0]].items()],
        )
    else:
        config, built = combine.config(united, configs, combination), []
        for path in dict.fromkeys(path for adapter in adapters for path in tuner.placed[adapter]):
            present = [(tuner.placed[a][path], w) for a, w in zip(adapters, weights) if path in tuner.placed[a]]
            built.append(_combined(tuner, path, present, config, combination, combine))
    plan = plan_of_layers(tuner.model, config, method, [item.placement for item in built])
    tuner.commit(name, config, built, freeze_base=False, plan=plan)


def _method_of(tuner: Tuner, adapters: Sequence[str], weights: Sequence[float]) -> Method:
    """The method that all these adapters are of; each is asked."""
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"needs one weight for each adapter, got {list(adapters)} and {list(weights)}")
    tuner.check_known(adapters, "does not exist")
    methods = {name: method_of(tuner.peft_config[name]) for name in adapters}
    first = methods[adapters[0]]
    other = next((name for name, method in methods.items() if method is not first), None)
    if other is not None:
        raise ValueError(
            f"adapters of several methods cannot be combined: {adapters[0]!r} is {first.name.value} and {other!r} is "
            f"{methods[other].name.value}"
        )
    return first


def _check_layers(tuner: Tuner, adapters: Sequence[str]) -> None:
    for adapter in adapters:
        which = tuner.peft_config[adapter].trained_biases()
        if which != "none":
            raise ValueError(
                f"only one adapter of a model can train biases, and {adapter!r} does (bias={which!r}): a combination with it "
                "would be the second. Merge it into the base instead, or combine adapters that were trained with bias='none'."
            )
    tied = [path for a in adapters for path, layer in tuner.placed[a].items() if layer.leaders or layer.own_config]
    if tied:
        raise UnsupportedFeatureError(
            f"adapters with rows of single tokens, or with layers that are tied to others, cannot be combined ({tied[0]!r})"
        )
    copies = [path for a in adapters for path, layer in tuner.placed[a].items() if isinstance(layer, WholeModule)]
    if len(set(copies)) != len(copies):
        raise ValueError(
            f"Cannot add weighted adapters that both have a copy of {sorted(copies)[0]!r} (modules_to_save)"
        )


# Fields that leave layers out which `target_modules` names.
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def _united(tuner: Tuner, configs: Mapping[str, PeftConfig], method: Method) -> PeftConfig:
    """The config of the first adapter, on the layers of all of them."""
    first, *others = configs.values()
    changes: dict[str, object] = {
        name: _union([_names(config, name) for config in configs.values()], name)
        for name in ("target_modules", *method.default_modules)
    }
    if any(field_value(c, name) != field_value(first, name) for name in _NARROWING for c in others):
        # What one of them leaves out another may have, so each layer is named by its whole path.
        changes |= {"target_modules": _targeted(tuner, configs), **dict.fromkeys(_NARROWING)}
    whole = [name for config in configs.values() for name in cast("list[str] | None", _saved(config)) or ()]
    changes |= {"modules_to_save": list(dict.fromkeys(whole))} if whole and _saved(first) != whole else {}
    own = field_names(first)
    return copy_config(first, inference_mode=True, **{name: value for name, value in changes.items() if name in own})


def _saved(config: PeftConfig) -> object:
    return field_value(config, "modules_to_save")


def _targeted(tuner: Tuner, configs: Iterable[str]) -> set[str]:
    """The whole paths of all layers that these adapters target."""
    layers = ((path, layer) for name in configs for path, layer in tuner.placed[name].items())
    return {path for path, layer in layers if not isinstance(layer, WholeModule) and not layer.names.above}


def _names(config: PeftConfig, name: str) -> set[str] | str | None:
    """The modules that one field of a config names, or a regular expression for them."""
    return cast("set[str] | str | None", field_value(config, name))


def _union(values: Sequence[set[str] | str | None], name: str) -> set[str] | str:
    """What selects all that one of `values` selects."""
    if len({isinstance(value, str) for value in values}) > 1:
        raise ValueError(f"all adapter configs should use the same type for `{name}`: all a str, or all a list")
    patterns = [value for value in values if isinstance(value, str)]
    if patterns:
        return "|".join(f"({pattern})" for pattern in dict.fromkeys(patterns))
    return {entry for value in values for entry in value or ()}


def _copied(tuner: Tuner, path: str, config: PeftConfig, layer: AdapterLayer) -> Built:
    """The layer once more, with tensors of its own."""
    base, cls = tuner.hosts[path].base, type(layer)
    slots = cls.slots(base, config, path)
    copied = cls(base, config, path, slots, {name: tensor.detach().clone() for name, tensor in layer.named_slots()})
    for attribute in () if isinstance(layer, WholeModule) else layer.numbers.values():  # they may have been set since
        setattr(copied, attribute, getattr(layer, attribute))
    return Built(Placement(path, base, cls, slots), copied)


def _combined(
    tuner: Tuner,
    path: str,
    present: Sequence[tuple[AdapterLayer, float]],
    config: PeftConfig,
    how: Combination,
    combine: Combine,
) -> Built:
    first = present[0][0]
    if isinstance(first, WholeModule):
        return _copied(tuner, path, config, first)
    base, cls = tuner.hosts[path].base, combine.layer_class(first)
    tensors = combine.tensors(base, path, config, present, how)
    slots = cls.slots(base, config, path)
    return Built(Placement(path, base, cls, slots), cls(base, config, path, slots, tensors))
