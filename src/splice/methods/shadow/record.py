"""SHADOW (arXiv 2604.19254): its record."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

from splice.checkpoint.types import PeftType
from splice.kinds.adapters import Adapters, layers_of
from splice.kinds.dropout import DropoutView
from splice.kinds.registry import Method, register
from splice.methods.shadow.blocks import ShadowBlock
from splice.methods.shadow.config import ShadowConfig, check
from splice.methods.shadow.detached import Detached, unload_shadow
from splice.methods.shadow.network import ShadowNetwork
from splice.methods.shadow.spellings import TENSORS, read_without_mark
from splice.methods.shadow.trunk import all_blocks


def _find_targets(network: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    return all_blocks(network)


def _dropout_of(layer: ShadowBlock) -> nn.Module:
    """What a block's adapter layer does in training to the difference of the two states."""
    return DropoutView(layer) if layer.dropout else nn.Identity()


def _last_loss(adapters: Adapters) -> torch.Tensor | None:
    """The loss of the active adapter's shadow network in the last call; None where that had none."""
    layers = layers_of(adapters, adapters.selection.active, ShadowNetwork)
    return next((layer.last_loss for layer in layers.values()), None)


METHOD = register(
    Method(
        name=PeftType.SHADOW,
        summary="Trains a small network beside the base, whose state moves the input of each block and follows its output.",
        config=ShadowConfig,
        prefix="shadow_",
        tensor_names=TENSORS,
        other_layer=ShadowBlock,
        network_layer=ShadowNetwork,
        find_targets=_find_targets,
        layer_views=MappingProxyType({"shadow_dropout": _dropout_of}),
        tuner_methods=MappingProxyType({"unload_shadow": unload_shadow}),
        tuner_views=MappingProxyType({"last_shadow_loss": _last_loss}),
        exclusive=True,
        readings=(read_without_mark,),
        check=check,
        names=MappingProxyType({"DetachedShadowModel": Detached}),
        paper="arXiv 2604.19254",
    )
)
