"""Prompt tuning: trained vectors in front of the embedded input. Lester et al., arXiv 2104.08691, section 2."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from splice.checkpoint.types import PeftType
from splice.config import PromptLearningConfig
from splice.kinds.registry import Method, register
from splice.methods.prompts.attributes import PROMPT_METHODS, PROMPT_VIEWS
from splice.methods.prompts.embedded import EmbeddedPrompt, embeddings_of
from splice.methods.prompts.prompt import Encoder, check_prompt


class PromptTuningInit(str, Enum):
    """What the virtual tokens start from: an embedded text, rows of the vocabulary, or noise."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: fields contradict each other.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.PROMPT_TUNING

    # What the virtual tokens start from: noise ("RANDOM"), embeddings of tokens chosen at random ("SAMPLE_VOCAB"), or
    # those of a text ("TEXT").
    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    # The text for "TEXT", repeated or cut to the number of virtual tokens.
    prompt_tuning_init_text: str | None = None
    # The tokenizer that cuts this text into tokens; "TEXT" needs it.
    tokenizer_name_or_path: str | None = None
    # Further arguments of the tokenizer's `from_pretrained`, with "TEXT" alone. `trust_remote_code` in it is ignored.
    tokenizer_kwargs: dict[str, object] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        from_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        if from_text and not (self.tokenizer_name_or_path and self.prompt_tuning_init_text):
            raise ValueError("prompt_tuning_init='TEXT' needs `tokenizer_name_or_path` and `prompt_tuning_init_text`")
        if self.tokenizer_kwargs and not from_text:
            raise ValueError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


class PromptEmbedding(Encoder):
    """The virtual tokens of prompt tuning, in the tree."""


class PromptTuning(EmbeddedPrompt):
    """The virtual tokens, (n * submodules, dim)."""

    encoder = PromptEmbedding

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: PromptTuningConfig) -> None:
        start_tokens(tensors["embedding.weight"], base, config)


def start_tokens(rows: torch.Tensor, base: nn.Module, config: PromptTuningConfig) -> None:
    """Fill `rows` with the values that virtual tokens start from."""
    nn.init.normal_(rows)  # also where it is overwritten, so that the same seed gives what it gives in the reference
    if config.prompt_tuning_init not in (PromptTuningInit.SAMPLE_VOCAB, PromptTuningInit.TEXT):
        return
    embeddings = embeddings_of(base)
    weight = embeddings.get_parameter("weight")
    if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
        ids = torch.randint(0, len(weight), (len(rows),))
    else:
        ids = _text_ids(config, len(rows))
    # Called, not indexed: some embeddings multiply what they look up, and the virtual tokens stand behind that.
    rows.copy_(embeddings(ids.to(weight.device)))


def _text_ids(config: PromptTuningConfig, count: int) -> torch.Tensor:
    """Token ids of the initial text, repeated or cut to `count`."""
    from transformers import AutoTokenizer

    # Never run code that a checkpoint's config asks for.
    options = {k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
    ids: list[int] = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)(
        config.prompt_tuning_init_text
    )["input_ids"]
    return torch.tensor((ids * (count // len(ids) + 1))[:count])


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
