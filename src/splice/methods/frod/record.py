"""The record of FRoD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import nn

from splice.base.layers import LayerKind
from splice.checkpoint.types import PeftType
from splice.kinds.dropout import dropout_of
from splice.kinds.reading import Checkpoint, Reading
from splice.kinds.registry import Method, register
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.frod.basis import place_count
from splice.methods.frod.config import FrodConfig
from splice.methods.frod.layer import FrodBases, FrodLayer


def _at_the_rate_of_another(
    checkpoint: Checkpoint, config: FrodConfig, network: nn.Module, modules: Mapping[str, nn.Module]
) -> Reading | None:
    """An adapter that joins others has the places of the first one, in the reference, whatever its `sparse_rate` says."""
    entries, counts = checkpoint.entries, set()
    for name, entry in entries.items():
        layer, _, suffix = name.rpartition(".")
        size = entries.get(f"{layer}.frod_lambda_l")
        if suffix == "frod_lambda_s_values" and size is not None and len(size.shape) == len(entry.shape) == 1:
            counts.add((size.shape[0], entry.shape[0]))
    # Between two counts, so that rounding does not matter.
    rates = [0.0, *((count + 0.5) / size**2 for size, count in sorted(counts) if size)]
    rate = next((r for r in rates if all(place_count(size, r) == count for size, count in counts)), None)
    if not counts or rate is None or all(place_count(size, config.sparse_rate) == count for size, count in counts):
        return None
    note = f"`sparse_rate` is {config.sparse_rate}, and was not followed when the adapter was made: it is read as {rate:.3g}"
    return Reading(checkpoint, replace(config, sparse_rate=rate), (note,))


def _notes(config: FrodConfig) -> list[str]:
    if config.save_projection:
        return []
    return [
        "its checkpoint holds no bases (`save_projection=False`), so they were worked out of the base's weights again. They "
        "come out the same on the same kind of processor with the same version of torch alone; elsewhere the output may be "
        "wrong. Where it was trained, save it with `save_projection=True`"
    ]


METHOD = register(
    Method(
        name=PeftType.FROD,
        summary="Writes all weights of a kind in one basis, and trains what each is there: a diagonal and a few more.",
        config=FrodConfig,
        prefix="frod_",
        tensor_names=frozenset({"frod_lambda_l", "frod_lambda_s_values", "frod_V", "frod_s_indices", "frod_s_size"}),
        layers=MappingProxyType({LayerKind.LINEAR: FrodLayer, LayerKind.TRANSPOSED_LINEAR: FrodLayer}),
        shared=FrodBases,
        layer_views=MappingProxyType(
            {
                "frod_dropout": dropout_of,
                "frod_V": lambda layer: layer.basis,
                "frod_s_indices": lambda layer: layer.places,
                "frod_s_size": lambda layer: layer.shared[0].tensor(f"frod_s_size.{layer.kind}"),
                "runtime_offload_base_weight": lambda layer: layer.config.runtime_offload_base_weight,
            }
        ),
        default_targets=MappingProxyType({**LORA_TARGETS, "phi": ["q_proj", "v_proj"], "vit": ["query", "value"]}),
        readings=(_at_the_rate_of_another,),
        loading_notes=_notes,
        paper="doi 10.1609/aaai.v40i31.39813",
    )
)
