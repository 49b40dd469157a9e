"""What virtual tokens in the place of embedded ones start from: noise, rows of the vocabulary, or a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from splice.base.dense import device_of
from splice.config import PromptLearningConfig
from splice.methods.prompts.embedded import embeddings_of

# Values of `prompt_tuning_init`.
TEXT, SAMPLE_VOCAB = "TEXT", "SAMPLE_VOCAB"


@dataclass
class StartedConfig(PromptLearningConfig):
    """The fields that say what virtual tokens start from.

    Raises:
        ValueError: fields contradict each other.
    """

    # What the virtual tokens start from; each method says which values it has.
    prompt_tuning_init: str = "RANDOM"
    # The text for "TEXT", repeated or cut to the number of virtual tokens.
    prompt_tuning_init_text: str | None = None
    # The tokenizer that cuts this text into tokens; "TEXT" needs it.
    tokenizer_name_or_path: str | None = None
    # Further arguments of the tokenizer's `from_pretrained`, with "TEXT" alone. `trust_remote_code` in it is ignored.
    tokenizer_kwargs: dict[str, object] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        from_text = self.prompt_tuning_init == TEXT
        if from_text and not (self.tokenizer_name_or_path and self.prompt_tuning_init_text):
            raise ValueError("prompt_tuning_init='TEXT' needs `tokenizer_name_or_path` and `prompt_tuning_init_text`")
        if self.tokenizer_kwargs and not from_text:
            raise ValueError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


def start_tokens(rows: torch.Tensor, base: nn.Module, config: StartedConfig) -> None:
    """Fill `rows` with the values that virtual tokens start from."""
    nn.init.normal_(rows)  # also where it is overwritten, so that the same seed gives what it gives in the reference
    if config.prompt_tuning_init not in (SAMPLE_VOCAB, TEXT):
        return
    embeddings = embeddings_of(base)
    weight = embeddings.get_parameter("weight")
    if config.prompt_tuning_init == SAMPLE_VOCAB:
        ids = torch.randint(0, len(weight), (len(rows),))
    else:
        ids = _text_ids(config, len(rows))
    # Called, not indexed: some embeddings multiply what they look up, and the virtual tokens stand behind that.
    rows.copy_(embeddings(ids.to(device_of(embeddings))))


def _text_ids(config: StartedConfig, count: int) -> torch.Tensor:
    """Token ids of the initial text, repeated or cut to `count`."""
    from transformers import AutoTokenizer

    # Never run code that a checkpoint's config asks for.
    options = {k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
    ids: list[int] = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)(
        config.prompt_tuning_init_text
    )["input_ids"]
    return torch.tensor((ids * (count // len(ids) + 1))[:count])
