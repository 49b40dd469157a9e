"""AdaLoRA (arXiv 2303.10512): its record."""

from __future__ import annotations

from types import MappingProxyType

from splice.base.layers import LayerKind
from splice.checkpoint.types import PeftType
from splice.kinds.adapters import Adapters
from splice.kinds.dropout import dropout_of
from splice.kinds.layer import AdapterLayer
from splice.kinds.registry import Beside, Method, register
from splice.methods.adalora.allocator import RankAllocator
from splice.methods.adalora.budget import in_training, update_and_allocate
from splice.methods.adalora.layers import (
    AdaLoraConfig,
    AdaLoraConv,
    AdaLoraLayer,
    check,
    check_beside,
    orthogonality_loss,
)
from splice.methods.default_targets import ADALORA_TARGETS

# Of the layers of plain LoRA; the reference's of AdaLoRA have them too, and empty.
_OF_PLAIN_LORA = ("lora_magnitude_vector", "use_dora", "use_rslora", "lora_bias", "lora_variant")


def _nothing(layer: AdapterLayer) -> None:
    return None


def _rank_allocator(adapters: Adapters) -> RankAllocator:
    name, config = in_training(adapters)
    return RankAllocator(adapters, config, name)


METHOD = register(
    Method(
        name=PeftType.ADALORA,
        summary="Trains LoRA as a singular value decomposition, and gives up ranks where they matter least.",
        config=AdaLoraConfig,
        prefix="lora_",
        tensor_names=frozenset({"lora_A", "lora_E", "lora_B", "ranknum"}),
        layers=MappingProxyType(
            {
                LayerKind.LINEAR: AdaLoraLayer,
                LayerKind.TRANSPOSED_LINEAR: AdaLoraLayer,
                LayerKind.CONV2D: AdaLoraConv,
            }
        ),
        tuner_methods=MappingProxyType({"update_and_allocate": update_and_allocate}),
        tuner_views=MappingProxyType(
            {
                "rankallocator": _rank_allocator,
                "trainable_adapter_name": lambda adapters: in_training(adapters)[0],
            }
        ),
        loss_term=orthogonality_loss,
        containers=("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B"),
        layer_views=MappingProxyType({"lora_dropout": dropout_of, **dict.fromkeys(_OF_PLAIN_LORA, _nothing)}),
        default_targets=ADALORA_TARGETS,
        check=check,
        check_beside=Beside(lambda config: not config.inference_mode, check_beside),
        names=MappingProxyType({"SVDLinear": AdaLoraLayer, "SVDConv2d": AdaLoraConv, "RankAllocator": RankAllocator}),
        paper="arXiv 2303.10512",
    )
)
