"""A small network of the class of another one: its config with other sizes, and how one is made without values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from splice.base.bare import original_class
from splice.base.foreign_models import config_of, field_of, has_field, set_field
from splice.errors import UnsupportedLayerError
from splice.methods.shadow.config import ShadowConfig

# What a size is called in configs of transformers, by the field of our config that changes it.
_NAMES: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "shadow_num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
        "shadow_hidden_size": ("hidden_size", "n_embd", "d_model"),
        "shadow_intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
        "shadow_num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
    }
)


class WithoutValues(TorchFunctionMode):
    """Inside, parameters of modules that are made have no values: they are on the meta device.

    Tables that are worked out when a module is made, and that no checkpoint holds, have theirs: of rotated positions.
    """

    # Not `torch.device("meta")`, which takes those too.

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.get("device") is None:
            options["device"] = torch.device("meta")
        return func(*args, **options)


def mirror_of(trunk: nn.Module, config: ShadowConfig) -> nn.Module:
    """A network of the class of `trunk`, of the sizes that `config` asks for, with the values that its class draws.

    Raises:
        UnsupportedLayerError: (a ValueError) the class is not made from a config alone, or that has no such size.
    """
    own = config_of(trunk)
    if own is None or isinstance(own, dict):
        raise UnsupportedLayerError(
            f"a mirror of {original_class(trunk).__name__} cannot be made: it has no `config` of transformers. Give a "
            "trained network as `shadow_model`."
        )
    make = cast("Callable[[object], nn.Module]", original_class(trunk))
    return make(mirror_config(own, config, original_class(trunk).__name__))


def mirror_config(own: object, config: ShadowConfig, name: str) -> object:
    """A copy of the config `own`, of a network called `name`, with the sizes that `config` asks for."""
    # Zero layers mean one, as in the reference.
    layers = config.shadow_num_hidden_layers or 1
    sizes = {**{field: vars(config)[field] for field in _NAMES}, "shadow_num_hidden_layers": layers}
    changed = copy.deepcopy(own)
    kinds = field_of(own, "layer_types")
    if isinstance(kinds, (list, tuple)) and kinds:
        set_field(changed, "layer_types", [*kinds[:layers], *[kinds[-1]] * (layers - len(kinds))])
    for field, size in sizes.items():
        if size is None:
            continue
        known = next((spelled for spelled in _NAMES[field] if has_field(own, spelled)), None)
        if known is None:
            raise UnsupportedLayerError(
                f"a mirror of {name} cannot be made: its config has none of {', '.join(_NAMES[field])}, for `{field}`. Give "
                "a trained network as `shadow_model`."
            )
        set_field(changed, known, size)
    window = field_of(own, "max_window_layers")
    if isinstance(window, int):
        set_field(changed, "max_window_layers", min(window, layers))
    return changed
