"""Where in a network the blocks stand that SHADOW adapts, and how wide they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import nn

from splice.base.foreign_models import backbone_path, config_of, diffusion_config, field_of
from splice.errors import UnsupportedLayerError

# Names of the child that holds all blocks, and of lists of blocks, in the order in which the reference looks for them.
_TRUNKS = ("model", "transformer", "base_model", "decoder")
_LISTS = ("layers", "h", "single_transformer_blocks", "transformer_blocks")
_WIDTHS = ("hidden_size", "n_embd", "d_model")


class Trunk(NamedTuple):
    """The part of a network that makes hidden states of its inputs, block by block."""

    # Its path; empty for the network itself.
    path: str
    # The module.
    module: nn.Module
    # Whether the network is a transformer for diffusion: it reads no tokens.
    diffuses: bool


def trunk_of(network: nn.Module) -> Trunk:
    """The trunk of `network`."""
    children = network._modules
    if "single_transformer_blocks" in children or ("transformer_blocks" in children and "layers" not in children):
        return Trunk("", network, True)
    path = next((found for found in (_child(network, name) for name in _TRUNKS) if found is not None), "")
    module = network.get_submodule(path)
    decoder = module._modules.get("decoder")
    if decoder is not None and _list_in(decoder):
        return Trunk(f"{path}.decoder" if path else "decoder", decoder, False)
    return Trunk(path, module, False)


def _child(network: nn.Module, name: str) -> str | None:
    """The path of what a network has under one of these names; None for nothing."""
    if network._modules.get(name) is not None:
        return name
    if name != "base_model" or not backbone_path(network):
        return None
    # A property of all models of transformers: the child of the class's own name for it, else the model itself.
    return backbone_path(network) if network._modules.get(backbone_path(network)) is not None else ""


def _list_in(trunk: nn.Module) -> str:
    return next((name for name in _LISTS if isinstance(trunk._modules.get(name), nn.ModuleList)), "")


def all_blocks(network: nn.Module) -> set[str]:
    """The paths of all blocks.

    Raises:
        UnsupportedLayerError: (a ValueError) nobody can tell where they are.
    """
    trunk = trunk_of(network)
    name = _list_in(trunk.module)
    if not name:
        raise UnsupportedLayerError(
            f"{type(trunk.module).__name__} has no list of blocks under one of the names {', '.join(_LISTS)}: name the "
            "blocks to adapt in `target_modules`."
        )
    front = f"{trunk.path}.{name}" if trunk.path else name
    return {f"{front}.{child}" for child in trunk.module.get_submodule(name)._modules}


def width_of(network: nn.Module) -> int:
    """How many features the hidden states have.

    Raises:
        UnsupportedLayerError: (a ValueError) the network's config does not say it.
    """
    trunk = trunk_of(network)
    config = config_of(trunk.module) or config_of(network) or diffusion_config(network)
    found = next((field_of(config, name) for name in _WIDTHS if field_of(config, name) is not None), None)
    if isinstance(found, int):
        return found
    heads, size = field_of(config, "num_attention_heads"), field_of(config, "attention_head_dim")
    if isinstance(heads, int) and isinstance(size, int):
        return heads * size
    raise UnsupportedLayerError(
        f"the width of the hidden states of {type(network).__name__} is not known: its `config` has none of "
        f"{', '.join(_WIDTHS)}, nor `num_attention_heads` and `attention_head_dim`. Set one of them."
    )


def check_row(paths: Sequence[str]) -> None:
    """Raise where these blocks, in the order of the model, do not stand one behind the other.

    Raises:
        UnsupportedLayerError: (a ValueError) so it is.
    """
    fronts = {path.rpartition(".")[0] for path in paths}
    numbers = [path.rpartition(".")[2] for path in paths]
    follow = all(n.isdigit() for n in numbers) and all(int(b) == int(a) + 1 for a, b in pairwise(numbers))
    if len(fronts) > 1 or not follow:
        raise UnsupportedLayerError(
            f"SHADOW adapts blocks that stand one behind the other in one list, and `target_modules` selects "
            f"{list(paths[:8])}. Name whole blocks, without gaps, and no layers inside of blocks."
        )
