"""Adaption prompt: trained tokens that the last attention layers look at beside the text, behind a gate.

Zhang et al., "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", arXiv 2303.16199, section
3.2. With the layer's own query q of a token, and the keys k and values v that the layer makes of the trained tokens, without
positions: `y = base(x) + o_proj(gate * softmax(q k^T / sqrt(d)) v)`. The gate is closed at first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import nn

from splice.base.bare import original_class
from splice.base.dense import dtype_of
from splice.base.layers import features
from splice.checkpoint.types import PeftType
from splice.config import PeftConfig, TargetRule
from splice.errors import UnsupportedLayerError
from splice.kinds.block import AddsToBlock
from splice.kinds.names import LayerNames, Place
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.ADAPTION_PROMPT
    # Programs tell this method from all others by it.
    is_adaption_prompt: ClassVar[bool] = True

    # Name of the attention layers, at the end of their paths; None for the name that is usual for the base's `model_type`.
    target_modules: str | None = None
    # How many trained tokens each layer has; it has to be given.
    adapter_len: int | None = None
    # How many attention layers are adapted, counted from the last one; 0 for all. It has to be given.
    adapter_layers: int | None = None

    def target_rule(self) -> TargetRule:
        named = None if self.target_modules is None else [self.target_modules]
        return TargetRule(named, last=self.adapter_layers or None)


def _check(config: AdaptionPromptConfig) -> None:
    for name, value, least in (("adapter_len", config.adapter_len, 1), ("adapter_layers", config.adapter_layers, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}")


class _Attention(Protocol):
    """What is asked of an attention layer of transformers."""

    head_dim: int


class _PromptNames(LayerNames):
    """The reference has no adapter's name in those of the tensors: it has the active adapter's alone on the model.

    Here all adapters stay: that of the default name has the reference's names, and any other stands beside it.
    """

    def is_on_layer(self, suffix: str, adapter_name: str) -> bool:
        return adapter_name == "default"

    def place(self, suffix: str) -> Place:
        return Place(f"{suffix}s", "")

    def in_reference(self, path: str, suffix: str, adapter_name: str) -> str:
        return self.path_in_reference(path) + suffix


class _Form(ABC):
    """How one kind of attention layers makes its queries, keys and values, and what it does with what is found."""

    # What such layers are called at the end of their paths.
    usual_name: ClassVar[str]

    @abstractmethod
    def query_of(self, base: nn.Module) -> nn.Module:
        """The layer that makes the queries."""

    @abstractmethod
    def added(self, layer: AdaptionPromptLayer, hidden: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        """(batch, T, hidden): what the trained tokens add for these hidden states."""

    def of_rows(self, call: Mapping[str, Any], rows: torch.Tensor) -> Mapping[str, Any]:
        """`call` for some rows of the batch alone, as far as `added` reads it."""
        return call


class _Rotary(_Form):
    """Projections of their own for queries, keys, values and the output, and rotated positions, as Llama has them."""

    usual_name = "self_attn"

    def query_of(self, base: nn.Module) -> nn.Module:
        return base.get_submodule("q_proj")

    def added(self, layer: AdaptionPromptLayer, hidden: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        q_proj, k_proj, v_proj, o_proj = (layer.base.get_submodule(f"{name}_proj") for name in "qkvo")
        q, tokens = layer.heads(q_proj(hidden)), layer.adaption_prompt
        cos, sin = (part.unsqueeze(1) for part in call["position_embeddings"])
        left, right = q.chunk(2, -1)
        q = q * cos + torch.cat([-right, left], -1) * sin
        k, v = (layer.heads(project(tokens)) for project in (k_proj, v_proj))
        groups = q.shape[1] // k.shape[1]
        # With the output's bias once more, as the reference has it: adapters were trained so.
        y: torch.Tensor = o_proj(layer.found(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
        return y

    def of_rows(self, call: Mapping[str, Any], rows: torch.Tensor) -> Mapping[str, Any]:
        # Positions may be those of all rows.
        parts = call["position_embeddings"]
        return {**call, "position_embeddings": [part if len(part) == 1 else part[rows] for part in parts]}


class _Joint(_Form):
    """One projection for queries, keys and values, as GPT-2 has it; what is found is not projected."""

    usual_name = "attn"

    def query_of(self, base: nn.Module) -> nn.Module:
        return base.get_submodule("q_attn" if "q_attn" in base._modules else "c_attn")

    def added(self, layer: AdaptionPromptLayer, hidden: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        both, size = layer.base.get_submodule("c_attn"), hidden.shape[-1]
        # Of attention to an encoder the queries have a layer of their own.
        q = self.query_of(layer.base)(hidden)[..., :size]
        k, v = both(layer.adaption_prompt)[..., -2 * size :].chunk(2, -1)
        return layer.found(layer.heads(q), layer.heads(k), layer.heads(v))


# By the class of the attention layer; others do more with queries or keys than is known here.
_FORMS: Mapping[str, _Form] = MappingProxyType(
    {"LlamaAttention": _Rotary(), "MistralAttention": _Rotary(), "GPT2Attention": _Joint()}
)


def _form_of(base: nn.Module, path: str) -> _Form:
    names = [cls.__name__ for cls in original_class(base).__mro__]
    found = next((_FORMS[name] for name in names if name in _FORMS), None)
    if found is None:
        raise UnsupportedLayerError(
            f"Target module {path!r} is not supported: ADAPTION_PROMPT cannot be put on a {names[0]}. Currently, only the "
            f"following modules are supported: {', '.join(_FORMS)}. Name attention layers in `target_modules`."
        )
    return found


class AdaptionPromptLayer(AddsToBlock):
    """Trained tokens (1, n, hidden) of one attention layer, and their gate (1)."""

    names = _PromptNames("model.")
    adaption_prompt, adaption_gate = Held(), Held()

    @classmethod
    def slots(cls, base: nn.Module, config: AdaptionPromptConfig, path: str) -> dict[str, Slot]:
        query = _form_of(base, path).query_of(base)
        own = dtype_of(query)
        # In the dtype of the layer, also a half: so the reference trains and writes them.
        dtype = own if own.is_floating_point and own.itemsize > 1 else torch.float32
        shape = (1, config.adapter_len or 0, features(query)[0])
        return {"adaption_prompt": Slot(shape, dtype=dtype), "adaption_gate": Slot((1,), dtype=dtype)}

    @classmethod
    def resolved(cls, base: nn.Module, config: AdaptionPromptConfig) -> dict[str, object]:
        # As the one name that it is in files, and not as a list.
        return {"target_modules": config.target_modules or _form_of(base, "").usual_name}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: AdaptionPromptConfig) -> None:
        nn.init.normal_(tensors["adaption_prompt"])
        nn.init.zeros_(tensors["adaption_gate"])

    def prepare(self, base: nn.Module, config: AdaptionPromptConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.form = _form_of(base, path)

    def added(self, hidden: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        return self.form.added(self, hidden, call)

    def of_rows(self, call: Mapping[str, Any], rows: torch.Tensor) -> Mapping[str, Any]:
        return self.form.of_rows(call, rows)

    def found(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(batch, T, heads * d): what queries (batch, heads, T, d) find in keys and values (1, heads, n, d)."""
        scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
        weights = (self.adaption_gate * scores.softmax(-1)).to(q.dtype)
        return (weights @ v).transpose(1, 2).flatten(2)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, T, heads * d) as (batch, heads, T, d)."""
        return x.view(*x.shape[:-1], -1, cast(_Attention, self.base).head_dim).transpose(1, 2)


METHOD = register(
    Method(
        name=PeftType.ADAPTION_PROMPT,
        summary="Lets the last attention layers look at trained tokens beside the text, behind a gate that starts at zero.",
        config=AdaptionPromptConfig,
        prefix="adaption_",
        tensor_names=frozenset({"adaption_prompt", "adaption_gate"}),
        other_layer=AdaptionPromptLayer,
        default_targets=MappingProxyType({"llama": ["self_attn"], "mistral": ["self_attn"], "gpt2": ["attn"]}),
        exclusive=True,
        check=_check,
        paper="arXiv 2303.16199",
    )
)
