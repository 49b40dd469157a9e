"""How many values an adapter trains, as the slots of its plan say: nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from splice import get_peft_config
from splice.errors import UnsupportedFeatureError
from splice.kinds.registry import Method
from splice.kinds.shared import SHARED_PATH
from splice.kinds.slot import Role
from splice.loading.laying_out import lay_out
from splice.loading.plan import Plan

# Widths of layers that are quickly decomposed.
_SMALL = (256, 512)


def network(width: int) -> Any:
    """A Llama of one block on the meta device, in which `q_proj` is a layer of `width` x `width`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "use_cache": False}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


# Laying out changes nothing, so one is enough for all methods.
_kept = cache(network)


def fields_of(method: Method, required: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config with the method's defaults, for `network`; with those that it cannot do without."""
    targets = {"target_modules": ["q_proj"]} if method.layers else {}
    return {"peft_type": method.name.value, "task_type": "CAUSAL_LM", **targets, **required}


def parameters(method: Method, width: int, required: Mapping[str, Any]) -> int | None:
    """How many values a new adapter on `network(width)` trains; None for one that stands on adapters of another method."""
    if method.experts is not None:
        return None
    config = get_peft_config(fields_of(method, required))
    try:
        return _trained(lay_out(_kept(width), config, method, new=True))
    except UnsupportedFeatureError:
        # The shapes follow from the values of the weight. How many there are in all does not, and grows with the width:
        # two small layers tell how, and values for a large one would take long to decompose.
        first, second = (_on_values(method, size, config) for size in _SMALL)
        return first + (second - first) * (width - _SMALL[0]) // (_SMALL[1] - _SMALL[0])


def _on_values(method: Method, width: int, config: Any) -> int:
    """The same, where `q_proj` has values."""
    base = network(width)
    layer = base.model.layers[0].self_attn.q_proj.to_empty(device="cpu")
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    return _trained(lay_out(base, config, method, new=True))


def _trained(plan: Plan) -> int:
    # What all layers share each of them may name too.
    shared = {suffix for placement in plan.placements if placement.path == SHARED_PATH for suffix in placement.slots}
    return sum(
        math.prod(slot.shape)
        for placement in plan.placements
        for suffix, slot in placement.slots.items()
        if slot.role is Role.TRAINED and suffix not in placement.leaders
        if placement.path == SHARED_PATH or suffix not in shared
    )
