"""Prefix tuning: trained keys and values in front of those of every layer. Li & Liang, arXiv 2101.00190, section 4."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.checkpoint.types import PeftType
from splice.config import PromptLearningConfig
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.methods.prompts.attributes import PROMPT_METHODS, PROMPT_VIEWS
from splice.methods.prompts.cached import CachedPrompt
from splice.methods.prompts.prompt import Encoder, PromptLayer, Reparameterised, check_prompt, token_count
from splice.methods.prompts.sizes import cache_sizes_of


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: `init_weights` is unknown.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.PREFIX_TUNING

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
        # Filled in from the base where they are None.
        sizes = {"num_attention_heads": self.num_attention_heads, "num_layers": self.num_layers}
        return {name: size for name, size in sizes.items() if size is not None}


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
        # Only of an adapter that is new: a checkpoint holds what the network gave, and nothing to train it further with.
        return ProjectedPrefix if config.prefix_projection else cls

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: PrefixTuningConfig) -> None:
        (nn.init.zeros_ if config.init_weights == "zero" else nn.init.normal_)(tensors["embedding.weight"])


class ProjectedPrefix(Reparameterised, Prefix):
    """The table as the output of a small network, which makes training steadier (section 4.3)."""

    @classmethod
    def slots(cls, base: nn.Module, config: PrefixTuningConfig, path: str) -> dict[str, Slot]:
        sizes = cache_sizes_of(base, config)
        dim, width = sizes["token_dim"], sizes["num_layers"] * 2 * sizes["token_dim"]
        hidden = config.encoder_hidden_size or dim
        shapes: dict[str, tuple[int, ...]] = {
            "embedding.weight": (token_count(config), dim),
            "transform.0.weight": (hidden, dim),
            "transform.0.bias": (hidden,),
            "transform.2.weight": (width, hidden),
            "transform.2.bias": (width,),
        }
        return {suffix: Slot(shape, dtype=torch.float32) for suffix, shape in shapes.items()}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: PrefixTuningConfig) -> None:
        nn.init.normal_(tensors["embedding.weight"])
        for name in ("transform.0", "transform.2"):
            weight = tensors[f"{name}.weight"]
            # Drawn as a layer of its own draws them, so that the same seed gives what it gives in the reference.
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            weight.copy_(linear.weight)
            tensors[f"{name}.bias"].copy_(linear.bias)
        if config.init_weights == "zero":
            nn.init.zeros_(tensors["transform.2.weight"])
            nn.init.zeros_(tensors["transform.2.bias"])

    def table(self) -> torch.Tensor:
        first, last = ((self.tensor(f"transform.{i}.weight"), self.tensor(f"transform.{i}.bias")) for i in (0, 2))
        return F.linear(torch.tanh(F.linear(self.table_tensor, *first)), *last)


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
