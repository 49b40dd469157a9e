"""A network whose layers are used several times (`layer_replication`): a deeper one with the same parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from splice.base.bare import bare_copy, walk_bare
from splice.base.foreign_models import config_of, has_cache_place, set_config_field
from splice.errors import counted

_LAYERS = re.compile(r"((model|transformer)\.)*(layers|h)|bert\.encoder\.layer")


def replicate(network: nn.Module, ranges: Sequence[Sequence[int]]) -> Callable[[], None]:
    """Rebuild the network's list of layers from ranges of it, and give what takes that back.

    The new layers are copies with the parameters of the old ones, which stay as they are, at hand for the way back.

    Args:
        network: with a list of layers.
        ranges: pairs [start, end), in the order in which the layers are called.

    Raises:
        ValueError: there is no such list, or a range goes beyond its end.
    """
    path, layers = _layers_of(network)
    chosen = [index for start, end in map(_pair, ranges) for index in _indices(start, end, len(layers), path)]
    stacked = nn.ModuleList(_copy(layers[source], place) for place, source in enumerate(chosen))
    stacked.training = layers.training
    parent_path, _, name = path.rpartition(".")
    parent = network.get_submodule(parent_path)
    own = _own_fields(network)
    before = {key: own[key] for key in _SIZES if own.get(key) is not None}
    parent._modules[name] = stacked
    for key, value in before.items():
        set_config_field(network, key, [value[i] for i in chosen] if isinstance(value, list) else len(chosen))

    def take_back() -> None:
        parent._modules[name] = layers
        for key, value in before.items():
            set_config_field(network, key, value)

    return take_back


# What configs of transformers say about the layers as a list.
_SIZES = ("num_hidden_layers", "n_layer", "layer_types")


def _own_fields(network: nn.Module) -> Mapping[str, object]:
    """The fields that stand on the config of `network` itself."""
    # Not whatever can be read there: some configs work `layer_types` out of other fields, and then it cannot be set.
    config = config_of(network)
    if config is None:
        return {}
    return config if isinstance(config, dict) else vars(config)


def _layers_of(network: nn.Module) -> tuple[str, nn.ModuleList]:
    # By the names that the reference knows: any other list may hold anything.
    for path, module in walk_bare(network).items():
        if isinstance(module, nn.ModuleList) and _LAYERS.fullmatch(path):
            return path, module
    raise ValueError(
        f"`layer_replication` needs a list of layers named `layers`, `h` or `bert.encoder.layer`; {type(network).__name__} "
        "has none."
    )


def _pair(value: Sequence[int]) -> tuple[int, int]:
    if isinstance(value, (str, int)) or len(value) != 2:
        raise ValueError(f"`layer_replication` is a list of pairs [start, end], got {value!r} in it")
    return value[0], value[1]


def _indices(start: int, end: int, count: int, path: str) -> range:
    if not 0 <= start < end <= count:
        raise ValueError(
            f"`layer_replication`: [{start}, {end}] is no range of the {counted(count, 'layer')} at {path!r}"
        )
    return range(start, end)


def _copy(layer: nn.Module, place: int) -> nn.Module:
    # A module of its own with the very parameters: the same module in two places could not carry two adapters.
    copy = bare_copy(layer, {id(parameter): parameter for parameter in layer.parameters()})
    for module in copy.modules():
        if has_cache_place(module):
            module.layer_idx = place  # type: ignore[assignment]
    return copy
