"""A shadow network by itself: what is left of a model when its base is taken away (`unload_shadow`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, cast

import torch
from torch import nn

from splice.base.bare import bare_copy
from splice.base.caches import NAMES
from splice.base.foreign_models import config_of, input_embedding_layer, output_embedding_layer
from splice.checkpoint.types import TaskType
from splice.errors import UnsupportedFeatureError
from splice.kinds.adapters import Adapters, layers_of
from splice.kinds.host import host_of
from splice.kinds.module_copy import WholeModule
from splice.methods.shadow.loss import loss_of_label, loss_of_tokens, state_of_last
from splice.methods.shadow.network import ShadowNetwork


class Detached(nn.Module):
    """`head(projection(backbone(x)))`, as a model of transformers: it generates, and computes a loss of labels."""

    # The shadow network.
    backbone: nn.Module
    # Brings its states to the width of the head.
    shadow_hidden_projection: nn.Module
    # What the base has behind its blocks; None where the states themselves are what is asked for.
    head: nn.Module | None
    # Whether the head labels sequences, and not tokens.
    labels_sequences: bool

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, as an output of transformers; the states (batch, T, d) where there is no head."""
        embeddings = cast("tuple[nn.Module, ...]", vars(self)["lent_embeddings"])
        if inputs_embeds is None and embeddings:
            inputs_embeds = embeddings[0](input_ids)
        given = {"input_ids": input_ids if inputs_embeds is None else None, "inputs_embeds": inputs_embeds}
        named = {**given, "attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        output = self.backbone(**{name: value for name, value in named.items() if value is not None})
        state = self.shadow_hidden_projection(output[0])
        if self.head is None:
            return state
        outputs = import_module("transformers.modeling_outputs")
        if self.labels_sequences:
            logits = self.head(state_of_last(state, attention_mask))
            loss = None if labels is None else loss_of_label(logits, labels)
            return outputs.SequenceClassifierOutput(loss=loss, logits=logits)
        logits = self.head(state)
        loss = None if labels is None else loss_of_tokens(logits, labels)
        # Of its own names alone: transformers knows the older one too, and takes one of the two.
        kept = {name: output[name] for name in NAMES if name in output.keys()}  # noqa: SIM118
        return outputs.CausalLMOutputWithPast(loss=loss, logits=logits, **kept)

    def get_input_embeddings(self) -> nn.Module | None:
        """What looks up tokens: the shadow network's own, or the base's."""
        embeddings = cast("tuple[nn.Module, ...]", vars(self)["lent_embeddings"])
        return embeddings[0] if embeddings else input_embedding_layer(self.backbone)

    def get_output_embeddings(self) -> nn.Module | None:
        """What gives the logits of tokens."""
        return None if self.labels_sequences else self.head


@cache
def _class() -> Callable[[object], Detached]:
    # Made when the first is asked for: nothing here imports transformers before.
    transformers = import_module("transformers")
    abilities = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")
    parents = (Detached, transformers.PreTrainedModel, transformers.GenerationMixin)
    members = {"__module__": __name__, "__doc__": Detached.__doc__, **dict.fromkeys(abilities, True)}
    return cast("Callable[[object], Detached]", type("DetachedShadowModel", parents, members))


def __getattr__(name: str) -> object:
    """The class, for pickle, which looks for it here."""
    if name == "DetachedShadowModel":
        return _class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def unload_shadow(adapters: Adapters, adapter_name: str | None = None, copy: bool = False) -> nn.Module:
    """The shadow network of an adapter by itself, with the head of the base behind it.

    Args:
        adapters: those of the model.
        adapter_name: whose it is; the active one's, if None.
        copy: give it tensors of its own. Otherwise it shares them with the model, which goes on as it was.

    Raises:
        ValueError: there is no such adapter.
        UnsupportedFeatureError: the network is a transformer for diffusion, whose shadow networks are of no use alone.
    """
    name = adapters.selection.active[0] if adapter_name is None and adapters.selection.active else adapter_name
    network = next(iter(layers_of(adapters, [name or ""], ShadowNetwork).values()), None)
    if network is None or name is None:
        raise ValueError(f"No shadow backbone found for adapter {name!r}; there are {list(adapters.peft_config)}.")
    if network.diffuses:
        raise UnsupportedFeatureError(
            "`unload_shadow`: the shadow network of a transformer for diffusion says nothing alone"
        )
    backbone = network.backbone.module
    embeddings = _module_of(input_embedding_layer(adapters.model), name, copy) if network.backbone.shares else None
    sequences = network.config.task_type == TaskType.SEQ_CLS
    head = network.own_head if sequences else output_embedding_layer(adapters.model)
    result = _class()(_config_of(backbone))
    if copy:
        lacks_table = backbone._modules.get("embed_tokens", backbone) is None
        backbone = _copied(backbone)
        if lacks_table:
            backbone._modules["embed_tokens"] = embeddings
    result.backbone, result.labels_sequences = backbone, sequences
    result.shadow_hidden_projection = _projection_of(network, copy)
    result.head = _module_of(head, name, copy)
    # No child: without a copy the embeddings are the base's.
    vars(result)["lent_embeddings"] = () if embeddings is None else (embeddings,)
    return result.train(backbone.training)


def _config_of(backbone: nn.Module) -> object:
    return copy.deepcopy(config_of(backbone))


def _copied(module: nn.Module) -> nn.Module:
    return bare_copy(module, {})


def _module_of(layer: nn.Module | None, name: str, copied: bool) -> nn.Module | None:
    """A layer of the base as the adapter `name` has it: its own copy, where it saves the layer whole."""
    host = None if layer is None else host_of(layer)
    own = None if host is None else host.layers.get(name)
    found = own.module if isinstance(own, WholeModule) else layer
    return _copied(found) if copied and found is not None else found


def _projection_of(network: ShadowNetwork, copied: bool) -> nn.Module:
    weight = network.projection
    if weight is None:
        return nn.Identity()
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer._parameters["weight"] = copy.deepcopy(weight) if copied else weight
    return layer
