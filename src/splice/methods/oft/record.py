"""What OFT is: its record."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from splice.base.layers import LayerKind
from splice.checkpoint.types import PeftType
from splice.kinds.layer import AdapterLayer
from splice.kinds.registry import Method, register
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.oft.config import OFTConfig, check
from splice.methods.oft.layers import OFT, OFTConv, OFTEmbedding, OFTLayer

_LAYERS: Mapping[LayerKind, type[AdapterLayer]] = MappingProxyType(
    {LayerKind.LINEAR: OFTLayer, LayerKind.CONV2D: OFTConv, LayerKind.EMBEDDING: OFTEmbedding}
)


def _dropout(layer: OFT) -> nn.Module | None:
    if isinstance(layer, OFTEmbedding):
        return None
    probability = layer.config.module_dropout
    return nn.Dropout(probability) if probability else nn.Identity()


METHOD = register(
    Method(
        name=PeftType.OFT,
        summary="Rotates the input of a layer (the output of an embedding), block by block, by trained orthogonal matrices.",
        config=OFTConfig,
        prefix="oft_",
        tensor_names=frozenset({"oft_R", "oft_embedding_R"}),
        layers=_LAYERS,
        containers=("oft_R", "oft_embedding_R"),
        layer_views=MappingProxyType({"oft_dropout": _dropout}),
        default_targets=LORA_TARGETS,
        outdated_names=MappingProxyType(
            {
                "oft_r": "those of OFT before version 0.16, which turned what comes out of a layer. Train the "
                "adapter again, or merge it with version 0.15 of the library it is from."
            }
        ),
        check=check,
        paper="arXiv 2306.07280",
    )
)
