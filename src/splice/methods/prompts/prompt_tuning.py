"""Prompt tuning: trained vectors in front of the embedded input. Lester et al., arXiv 2104.08691, section 2."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from splice.checkpoint.types import PeftType
from splice.kinds.registry import Method, register
from splice.methods.prompts.attributes import PROMPT_METHODS, PROMPT_VIEWS
from splice.methods.prompts.counts import check_prompt
from splice.methods.prompts.embedded import EmbeddedPrompt
from splice.methods.prompts.prompt import Encoder
from splice.methods.prompts.starts import StartedConfig, start_tokens


class PromptTuningInit(str, Enum):
    """What the virtual tokens start from: an embedded text, rows of the vocabulary, or noise."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(StartedConfig):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: fields contradict each other.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.PROMPT_TUNING

    # What the virtual tokens start from: noise ("RANDOM"), embeddings of tokens chosen at random ("SAMPLE_VOCAB"), or
    # those of a text ("TEXT").
    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM


class PromptEmbedding(Encoder):
    """The virtual tokens of prompt tuning, in the tree."""


class PromptTuning(EmbeddedPrompt):
    """The virtual tokens, (n * submodules, dim)."""

    encoder = PromptEmbedding

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: PromptTuningConfig) -> None:
        start_tokens(tensors["embedding.weight"], base, config)


METHOD = register(
    Method(
        name=PeftType.PROMPT_TUNING,
        summary="Puts trained vectors in front of the embedded input.",
        config=PromptTuningConfig,
        prefix="prompt_tuning_",
        tensor_names=frozenset({"prompt_embeddings"}),
        network_layer=PromptTuning,
        check=check_prompt,
        tuner_methods=PROMPT_METHODS,
        tuner_views=PROMPT_VIEWS,
        names=MappingProxyType({"PromptEmbedding": PromptEmbedding}),
        paper="arXiv 2104.08691",
    )
)
