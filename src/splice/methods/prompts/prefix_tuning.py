"""Prefix tuning: trained keys and values in front of those of every layer. Li & Liang, arXiv 2101.00190, section 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from splice.checkpoint.types import PeftType
from splice.config import PromptLearningConfig
from splice.kinds.registry import Method, register
from splice.methods.prompts.attributes import PROMPT_METHODS, PROMPT_VIEWS
from splice.methods.prompts.cached import CachedPrompt, computed_sizes
from splice.methods.prompts.counts import check_prompt, token_count
from splice.methods.prompts.prompt import Encoder, PromptLayer
from splice.methods.prompts.reparameterised import Reparameterised
from splice.methods.prompts.sizes import cache_sizes_of


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: `init_weights` is unknown.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.PREFIX_TUNING
    # A field of cartridges, whose files hold the same table: it says how a cartridge is trained.
    legacy_fields: ClassVar[frozenset[str]] = frozenset({"num_frozen_tokens"})

    # "zero" for keys and values that start at zero (they still take attention from the text); None for random ones.
    init_weights: str | None = None
    # Width of the hidden layer of the network for `prefix_projection`; None for `token_dim`.
    encoder_hidden_size: int | None = None
    # Whether a new adapter trains a small network whose output is keys and values; a checkpoint holds the output.
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"`init_weights` must be 'zero' or None, got {self.init_weights!r}")

    def computed(self) -> dict[str, object]:
        return computed_sizes(self)


class PrefixEncoder(Encoder):
    """The keys and values of prefix tuning, in the tree."""


class Prefix(CachedPrompt):
    """Keys and values, however they come about."""

    encoder = PrefixEncoder

    @classmethod
    def resolved(cls, base: nn.Module, config: PrefixTuningConfig) -> dict[str, object]:
        sizes = super().resolved(base, config)
        return {**sizes, "encoder_hidden_size": config.encoder_hidden_size or sizes["token_dim"]}


class PrefixTuning(Prefix):
    """The table of keys and values itself."""

    @classmethod
    def for_training(cls, config: PrefixTuningConfig) -> type[PromptLayer]:
        # A checkpoint of the reference holds what the network gave, and nothing to train it further with: then the table is.
        return ProjectedPrefix if config.prefix_projection else cls

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: PrefixTuningConfig) -> None:
        (nn.init.zeros_ if config.init_weights == "zero" else nn.init.normal_)(tensors["embedding.weight"])


class ProjectedPrefix(Reparameterised, Prefix):
    """The table as the output of a small network, which makes training steadier (section 4.3)."""

    @classmethod
    def width(cls, base: nn.Module, config: PrefixTuningConfig) -> tuple[int, int]:
        return token_count(config), cache_sizes_of(base, config)["token_dim"]

    @classmethod
    def behind(cls, base: nn.Module, config: PrefixTuningConfig) -> Mapping[str, nn.Module]:
        sizes = cache_sizes_of(base, config)
        dim = sizes["token_dim"]
        hidden = config.encoder_hidden_size or dim
        first, last = nn.Linear(dim, hidden), nn.Linear(hidden, sizes["num_layers"] * 2 * dim)
        if config.init_weights == "zero":
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        return {"transform": nn.Sequential(first, nn.Tanh(), last)}

    def table(self) -> torch.Tensor:
        table: torch.Tensor = self.module("transform")(self.table_tensor)
        return table

    def check_fillable(self) -> None:
        raise ValueError(
            "Initialization from KV cache is not supported for prefix tuning with `prefix_projection=True`: keys and values "
            "are what a network makes of other tensors. Make the adapter without it."
        )


METHOD = register(
    Method(
        name=PeftType.PREFIX_TUNING,
        summary="Puts trained keys and values in front of those of every attention layer.",
        config=PrefixTuningConfig,
        prefix="prefix_tuning_",
        tensor_names=frozenset({"prompt_embeddings"}),
        network_layer=PrefixTuning,
        check=check_prompt,
        tuner_methods=PROMPT_METHODS,
        tuner_views=PROMPT_VIEWS,
        names=MappingProxyType({"PrefixEncoder": PrefixEncoder}),
        paper="arXiv 2101.00190",
    )
)
