"""`create_arrow_model`: a base model, its experts and the router that mixes them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from splice.base.bare import original_class
from splice.base.layers import LayerKind, kind_of
from splice.discovery import public
from splice.errors import UnsupportedFeatureError
from splice.kinds.adapters import Loads, adapters_on, layers_of, load_first
from splice.kinds.layer import AdapterLayer
from splice.methods.lora.arrow import ROUTER, check_expert
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.subconfigs import ArrowConfig

_LINEAR = (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR)


@public
def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> Any:
    """Load LoRA adapters as experts, and put a router on the model that mixes them for each token (Arrow).

    Args:
        base_model: changed in place; if anything fails, it is as it was.
        task_specific_adapter_paths: the experts, as "task_0", "task_1"...: folders, ids on the Hub, or
            "user/repo/sub/folder".
        arrow_config: copied; which adapters it is about is filled in.
        general_adapter_paths: with `use_gks`, what is taken out of the experts, as "gks_0"...
        **adapter_kwargs: options of every load, as of `PeftModel.from_pretrained`.

    Returns:
        A PeftModel with the router "arrow_router" active. Adapters that are loaded later become experts as well.

    Raises:
        ValueError: there are fewer experts than `top_k`, none, or no general ones with `use_gks`; or they differ in rank,
            shapes or targets.
        TypeError: an expert is on layers that are not linear.
        UnsupportedFeatureError: an expert is more than plain LoRA.
    """
    general = list(general_adapter_paths or ()) if arrow_config.use_gks else []
    _check_given(arrow_config, task_specific_adapter_paths, general)
    tasks = {f"task_{index}": path for index, path in enumerate(task_specific_adapter_paths)}
    others = {f"gks_{index}": path for index, path in enumerate(general)}
    (first, path), *more = {**tasks, **others}.items()
    model_id, subfolder = _place(path)
    model: Loads = load_first(base_model, model_id, first, **subfolder, **adapter_kwargs)
    try:
        for name, path in more:
            model_id, subfolder = _place(path)
            model.load_adapter(model_id, name, **subfolder, **adapter_kwargs)
        for name in (*tasks, *others):
            check_expert(_lora(model, name), repr(name))
        _check_alike(base_model, [*tasks, *others])
        options = copy.deepcopy(arrow_config)
        options.task_adapter_names, options.gks_adapter_names = list(tasks), list(others)
        like = _lora(model, first)
        config = LoraConfig(r=like.r, target_modules=copy.copy(like.target_modules), arrow_config=options)
        model.add_adapter(ROUTER, config)
        model.set_adapter(ROUTER)
    except BaseException:
        model.unload()
        raise
    return model


def _check_given(config: ArrowConfig, tasks: Sequence[str], general: Sequence[str]) -> None:
    if not tasks:
        raise ValueError("`task_specific_adapter_paths` should name at least one adapter, and is empty")
    if config.use_gks and not general:
        raise ValueError(
            "You should provide general LoRA paths if you want to use GenKnowSub: `general_adapter_paths`."
        )
    if config.top_k > len(tasks):
        raise ValueError(
            f"Arrow gives each token top_k={config.top_k} experts, and `task_specific_adapter_paths` has {len(tasks)}: lower "
            "`top_k` of the ArrowConfig, or give more adapters."
        )


def _lora(model: Loads, name: str) -> LoraConfig:
    config = model.peft_config[name]
    if not isinstance(config, LoraConfig):
        raise UnsupportedFeatureError(f"Arrow mixes adapters of LoRA, and {name!r} is one of {config.peft_type}.")
    return config


def _place(path: str) -> tuple[str, dict[str, str]]:
    """Where an adapter is, and the option that says in which subfolder: behind "user/repo" of an id follows one."""
    user, _, rest = str(path).partition("/")
    repository, _, subfolder = rest.partition("/")
    if not subfolder or Path(path).exists():
        return str(path), {}
    return f"{user}/{repository}", {"subfolder": subfolder}


def _check_alike(network: nn.Module, names: Sequence[str]) -> None:
    """Raise where the adapters are on other layers than the first, of other shapes, or on layers that are not linear."""
    adapters = adapters_on(network)
    assert adapters is not None
    first = layers_of(adapters, names[:1], AdapterLayer)
    other = next((path for path, layer in first.items() if kind_of(layer.base) not in _LINEAR), None)
    if other is not None:
        raise TypeError(
            f"LoRA adapters must only target Linear layers to be mixed by Arrow, and {names[0]!r} is on {other!r}, of "
            f"class {original_class(first[other].base).__name__}."
        )
    for name in names[1:]:
        layers = layers_of(adapters, [name], AdapterLayer)
        if set(layers) != set(first):
            path = sorted(set(layers).symmetric_difference(first))[0]
            raise ValueError(
                f"adapters that Arrow mixes must have the same targets: of {names[0]!r} and {name!r} only one is on {path!r}"
            )
        for path, layer in layers.items():
            one, two = _shapes(first[path]), _shapes(layer)
            if one != two:
                raise ValueError(
                    f"adapters that Arrow mixes must have the same rank and shapes: at {path!r}, {names[0]!r} has {one} and "
                    f"{name!r} {two}"
                )


def _shapes(layer: AdapterLayer) -> dict[str, tuple[int, ...]]:
    return {suffix: tuple(tensor.shape) for suffix, tensor in layer.named_slots()}
