"""The network that makes the state of SHADOW: which one a config asks for, and how it is put together."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

from torch import nn

from splice.base.bare import original_class
from splice.base.foreign_models import config_of, field_of, input_embedding_layer, output_embedding_layer
from splice.base.signatures import named_arguments
from splice.errors import UnsupportedLayerError
from splice.methods.shadow.config import MIRROR, ShadowConfig
from splice.methods.shadow.mirror import WithoutValues, mirror_of
from splice.methods.shadow.token_mlp import TokenMLP
from splice.methods.shadow.trained import TrainedNetwork
from splice.methods.shadow.trunk import trunk_of, width_of


class Backbone(NamedTuple):
    """A shadow network."""

    # The network.
    module: nn.Module
    # How many features its states have.
    width: int
    # Whether it is given what the base's embeddings make of tokens.
    shares: bool = False
    # Names of its parameters that are never trained.
    fixed: frozenset[str] = frozenset()
    # What brings its states to the base's width, (out, in); None where a new adapter draws it, or has none.
    projection: nn.Parameter | None = None
    # Whether something has to bring its states to the base's width.
    projects: bool = False


def backbone_of(network: nn.Module, config: ShadowConfig, with_values: bool) -> Backbone:
    """The shadow network that `config` asks for on `network`; without values its parameters are on the meta device.

    Raises:
        ValueError: it cannot be made for this network.
        OSError: `shadow_model` is a folder or Hub id, and cannot be found.
    """
    trunk = trunk_of(network)
    with nullcontext() if with_values else WithoutValues():
        if trunk.diffuses:
            return _for_diffusion(network, config)
        return _mirror(network, config) if config.shadow_model == MIRROR else _trained(network, config, with_values)


def _mirror(network: nn.Module, config: ShadowConfig) -> Backbone:
    trunk, width = trunk_of(network).module, width_of(network)
    module = mirror_of(trunk, config)
    own = config.shadow_hidden_size or width
    shares = config.share_embeddings and own == width and "inputs_embeds" in named_arguments(module)
    if shares and "embed_tokens" in module._modules:
        # As the reference, which looks for this name alone: tables of other names stay, and are never read.
        module._modules["embed_tokens"] = None
    return Backbone(module, own, shares, projects=own != width)


def _trained(network: nn.Module, config: ShadowConfig, with_values: bool) -> Backbone:
    width = width_of(network)
    found = TrainedNetwork.at(config.shadow_model, with_values)
    own = field_of(config_of(found.module), "hidden_size")
    own = own if isinstance(own, int) else width_of(found.module)
    ends = {input_embedding_layer(found.module), output_embedding_layer(found.module)} - {None}
    fixed = {
        f"{path}.{name}" for path, m in found.module.named_modules() if m in ends for name, _ in m.named_parameters()
    }
    found.check_projection(width, own)
    return Backbone(found.module, own, False, frozenset(fixed), found.projection, found.is_projected or own != width)


def _for_diffusion(network: nn.Module, config: ShadowConfig) -> Backbone:
    if config.shadow_model != MIRROR:
        raise UnsupportedLayerError(
            f"`shadow_model` is {config.shadow_model!r}, and {original_class(network).__name__} is a transformer for "
            f"diffusion, which a trained network cannot shadow. Set `shadow_model='{MIRROR}'`."
        )
    width = width_of(network)
    own = config.shadow_hidden_size or width
    inner = config.shadow_intermediate_size or own
    return Backbone(TokenMLP(width, own, inner, config.shadow_num_hidden_layers or 1), own, projects=own != width)
