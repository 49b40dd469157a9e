"""LoRA (arXiv 2106.09685): its record, and which of its relatives a config asks for."""

from __future__ import annotations

from types import MappingProxyType

from splice.config import PeftType
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.lora_config import LoraConfig, LoraRuntimeConfig, check, with_rank
from splice.methods.lora_layers import LoraConv, LoraEmbedding, LoraLayer, LoraLinear
from splice.methods.lora_parameters import LoraParameters
from splice.methods.registry import Combining, Method, register
from splice.weights.layers import LayerKind

__all__ = ["METHOD", "LoraConfig", "LoraLayer", "LoraRuntimeConfig", "with_rank"]

METHOD = register(
    Method(
        name=PeftType.LORA,
        config=LoraConfig,
        prefix="lora_",
        tensor_names=frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}),
        layers=MappingProxyType(
            {
                LayerKind.LINEAR: LoraLinear,
                LayerKind.TRANSPOSED_LINEAR: LoraLinear,
                LayerKind.EMBEDDING: LoraEmbedding,
                LayerKind.CONV1D: LoraConv,
                LayerKind.CONV2D: LoraConv,
                LayerKind.CONV3D: LoraConv,
            }
        ),
        parameters_layer=LoraParameters,
        default_targets=LORA_TARGETS,
        combining=Combining.FACTORS,
        check=check,
        paper="arXiv 2106.09685",
    )
)
