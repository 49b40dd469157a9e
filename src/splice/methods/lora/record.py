"""LoRA (arXiv 2106.09685): its record, and which of its relatives a config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from splice.base.layers import LayerKind
from splice.checkpoint.types import PeftType
from splice.errors import UnsupportedFeatureError, UnsupportedLayerError
from splice.kinds.dropout import dropout_of
from splice.kinds.layer import AdapterLayer
from splice.kinds.registry import Beside, Method, register
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.lora.alora import AloraLinear
from splice.methods.lora.approximation import AsLora
from splice.methods.lora.arrow import ArrowLinear, check_beside_router, is_router
from splice.methods.lora.attention import LoraAttention
from splice.methods.lora.attributes import CONTAINERS, LAYER_VIEWS, reset_lora_parameters
from splice.methods.lora.bdlora import BdLoraLinear
from splice.methods.lora.combining import CombinedFactors
from splice.methods.lora.config import TENSOR_NAMES, LoraConfig, LoraRuntimeConfig, active_variants, check, with_rank
from splice.methods.lora.corda import CordaLinear
from splice.methods.lora.divided import DividedEmbedding, DividedLinear
from splice.methods.lora.dora import DoraConv, DoraEmbedding, DoraLinear
from splice.methods.lora.experts import with_stacked_experts
from splice.methods.lora.inits import CORDA, LOFTQ, LORA_GA, MICA, check_init_on, notes_about, takes_from_base
from splice.methods.lora.kasa import KasaLinear, kasa_loss
from splice.methods.lora.layers import LoraConv, LoraEmbedding, LoraLinear, LowRank
from splice.methods.lora.loftq import LoftqLinear
from splice.methods.lora.loraga import GradientDoraLinear, GradientLinear, has_gradient
from splice.methods.lora.merged_linear import as_plain
from splice.methods.lora.mica import MicaEmbedding, MicaLinear
from splice.methods.lora.monteclora import MontecloraLinear, monteclora_loss
from splice.methods.lora.parameters import LoraParameters
from splice.methods.lora.qalora import QaloraLinear, as_plain_elsewhere, is_for
from splice.methods.lora.residual import TakenDoraLinear, TakenLinear
from splice.methods.lora.stacked import JOINS, as_stacked
from splice.methods.lora.swapping import RankSwapping
from splice.methods.lora.unchanged_base import for_unchanged_base, subtract_mutated_init
from splice.methods.lora.velora import VeloraLinear

__all__ = ["METHOD", "LoraConfig", "LowRank", "LoraRuntimeConfig", "with_rank"]

_CONVOLUTIONS = (LayerKind.CONV1D, LayerKind.CONV2D, LayerKind.CONV3D)
_LINEAR = (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR)
_LAYERS: Mapping[LayerKind, type[AdapterLayer]] = MappingProxyType(
    {
        **dict.fromkeys(_LINEAR, LoraLinear),
        LayerKind.EMBEDDING: LoraEmbedding,
        **dict.fromkeys(_CONVOLUTIONS, LoraConv),
        LayerKind.ATTENTION: LoraAttention,
    }
)
# By the field of the config that asks for it.
_VARIANTS: Mapping[str, Mapping[LayerKind, type[AdapterLayer]]] = MappingProxyType(
    {
        "use_dora": {
            **dict.fromkeys(_LINEAR, DoraLinear),
            LayerKind.EMBEDDING: DoraEmbedding,
            **dict.fromkeys(_CONVOLUTIONS, DoraConv),
        },
        "alora_invocation_tokens": dict.fromkeys(_LINEAR, AloraLinear),
        "use_bdlora": dict.fromkeys(_LINEAR, BdLoraLinear),
        "arrow_config": dict.fromkeys(_LINEAR, ArrowLinear),
        "kasa_config": {LayerKind.LINEAR: KasaLinear},
        "monteclora_config": dict.fromkeys(_LINEAR, MontecloraLinear),
        "velora_config": dict.fromkeys(_LINEAR, VeloraLinear),
    }
)


# By the same fields, for initialisations that take something out of the base weight.
_TAKEN: Mapping[str, type[AdapterLayer]] = MappingProxyType({"": TakenLinear, "use_dora": TakenDoraLinear})
_CORDA: Mapping[str, type[AdapterLayer]] = MappingProxyType({"": CordaLinear})
_MICA: Mapping[LayerKind, type[AdapterLayer]] = MappingProxyType(
    {**dict.fromkeys(_LINEAR, MicaLinear), LayerKind.EMBEDDING: MicaEmbedding}
)
# `check_init_on` lets it through on no other kind.
_LOFTQ: Mapping[LayerKind, type[AdapterLayer]] = MappingProxyType({LayerKind.LINEAR: LoftqLinear})


# By the same fields, for one that starts at the gradient of a base layer.
_FROM_GRADIENT: Mapping[str, type[AdapterLayer]] = MappingProxyType(
    {"": GradientLinear, "use_dora": GradientDoraLinear}
)


# What is used where the base is stored as QA-LoRA wants it.
_QALORA: Mapping[LayerKind, type[AdapterLayer]] = MappingProxyType({LayerKind.LINEAR: QaloraLinear})


def _on_codes(config: LoraConfig) -> type[AdapterLayer]:
    others = active_variants(config)
    if others:
        raise UnsupportedFeatureError(f"`use_qalora` with `{others[0]}` is not supported: switch one of them off.")
    return _QALORA[LayerKind.LINEAR]


def variant(config: LoraConfig, kind: LayerKind, base: nn.Module | None) -> type[AdapterLayer] | None:
    """The adapter layer of the relative of LoRA that `config` asks for, on `base` if it is given; None for plain LoRA.

    Raises:
        UnsupportedLayerError: (a ValueError) it cannot be put on such a layer.
        UnsupportedFeatureError: the relative and the initialisation do not go together.
    """
    if config.use_qalora and base is not None and is_for(base):
        return _on_codes(config)
    asked, init = active_variants(config), config.init_lora_weights
    check_init_on(init, kind)
    # Without a gradient it is an adapter that was trained on the changed base: then nothing is left of how it started.
    from_gradient = init == LORA_GA and base is not None and has_gradient(base)
    if (takes_from_base(init) or from_gradient) and kind in _LINEAR:
        layers = _FROM_GRADIENT if from_gradient else _CORDA if init == CORDA else _TAKEN
        relative = asked[0] if asked else ""
        if relative not in layers:
            raise UnsupportedFeatureError(f"init_lora_weights={init!r} with `{relative}` is not supported.")
        return layers[relative]
    if init == LOFTQ:
        return _LOFTQ[kind]
    if not asked:
        return _MICA[kind] if init == MICA else None
    on = _VARIANTS[asked[0]]
    if kind not in on:
        raise UnsupportedLayerError(
            f"`{asked[0]}` cannot be used on a layer of the kind {kind.name}; it can on: "
            f"{', '.join(k.name for k in on)}. Leave such layers out of the targets."
        )
    return on[kind]


METHOD = register(
    Method(
        name=PeftType.LORA,
        summary="Adds to a weight the product of two small trained matrices, so that the update is of low rank.",
        config=LoraConfig,
        prefix="lora_",
        tensor_names=TENSOR_NAMES,
        layers=_LAYERS,
        variant=variant,
        divided_layers=MappingProxyType({LoraLinear: DividedLinear, LoraEmbedding: DividedEmbedding}),
        parameters_layer=LoraParameters,
        tuner_methods=MappingProxyType(
            {
                "_get_kasa_loss": kasa_loss,
                "_get_monteclora_loss": monteclora_loss,
                "subtract_mutated_init": subtract_mutated_init,
            }
        ),
        containers=CONTAINERS,
        call_arguments=frozenset({"alora_offsets"}),
        layer_views=MappingProxyType({"lora_dropout": dropout_of, **LAYER_VIEWS}),
        layer_methods=MappingProxyType({"reset_lora_parameters": reset_lora_parameters}),
        default_targets=LORA_TARGETS,
        approximation=AsLora(),
        combine=CombinedFactors(),
        swapping=RankSwapping(),
        readings=(as_plain, as_plain_elsewhere, as_stacked),
        restated=with_stacked_experts,
        joins=JOINS,
        for_unchanged_base=for_unchanged_base,
        tags=("lora",),
        check=check,
        check_beside=Beside(is_router, check_beside_router),
        loading_notes=lambda config: notes_about(config.init_lora_weights),
        paper="arXiv 2106.09685",
    )
)
