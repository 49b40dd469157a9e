"""Prompt tuning: trained vectors in front of the embedded input. Lester et al., arXiv 2104.08691, section 2.

With n virtual tokens P (n, dim) and the embedded input E (batch, T, dim), the base model gets [P; E] and a mask with n
ones in front; logits have length n + T. While generating, P goes in with the first step and stays in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from splice.config import PeftType, PromptLearningConfig, TaskType
from splice.errors import UnsupportedFeatureError
from splice.methods.layer import AdapterLayer, Forward, Slots
from splice.methods.registry import Method, register


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

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        from_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        if from_text and not (self.tokenizer_name_or_path and self.prompt_tuning_init_text):
            raise ValueError("prompt_tuning_init='TEXT' needs `tokenizer_name_or_path` and `prompt_tuning_init_text`")
        if self.tokenizer_kwargs and not from_text:
            raise ValueError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


def _check(config: PromptTuningConfig) -> None:
    if not isinstance(config.num_virtual_tokens, int) or config.num_virtual_tokens <= 0:
        raise ValueError(f"`num_virtual_tokens` should be a positive integer, got {config.num_virtual_tokens!r}")
    if config.task_type != TaskType.CAUSAL_LM:
        raise UnsupportedFeatureError(
            f"prompt tuning for task_type {config.task_type} is not supported yet, CAUSAL_LM is"
        )
    if config.modules_to_save:
        raise UnsupportedFeatureError("prompt tuning with modules_to_save is not supported yet")


# Where the configs of transformers keep each size.
_SIZES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


def sizes_of(network: Any, config: PromptLearningConfig) -> dict[str, Any]:
    """The sizes that `config` leaves open, read from the base model's config.

    Raises:
        ValueError: the base model's config does not say one of them.
    """
    base = network.config.to_dict()
    base = base.get("text_config") or base
    found = {"num_transformer_submodules": config.num_transformer_submodules or 1}
    for field, names in _SIZES.items():
        value = getattr(config, field) or next((base[name] for name in names if name in base), None)
        if value is None:
            raise ValueError(f"Please specify `{field}` in `peft_config`: the base model's config has none of {names}")
        found[field] = value
    return found


class PromptTuning(AdapterLayer):
    """The virtual tokens. The target is the whole network: what is adapted is its call."""

    embedding: Slots
    look_up: Forward

    @classmethod
    def resolved(cls, base: nn.Module, config: Any) -> dict[str, Any]:
        return sizes_of(base, config)

    @classmethod
    def slots(cls, base: nn.Module, config: Any, path: str) -> dict[str, tuple[int, ...]]:
        sizes = sizes_of(base, config)
        return {
            "embedding.weight": (config.num_virtual_tokens * sizes["num_transformer_submodules"], sizes["token_dim"])
        }

    @classmethod
    def key(cls, path: str, suffix: str) -> str:
        return "prompt_embeddings"

    @classmethod
    def held_dtype(cls, base: nn.Module, suffix: str, autocast: bool) -> torch.dtype:
        return torch.float32

    @classmethod
    def full_memory_name(cls, path: str, suffix: str, adapter_name: str) -> str:
        return f"prompt_encoder.{adapter_name}.{suffix}"

    def base_front(self, path: str) -> str:
        return "base_model."

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: Any, config: PromptTuningConfig) -> None:
        rows = tensors["embedding.weight"]
        embeddings = base.get_input_embeddings()
        if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, embeddings.weight.shape[0], (len(rows),))
            rows.copy_(embeddings.weight[ids.to(embeddings.weight.device)])
        elif config.prompt_tuning_init == PromptTuningInit.TEXT:
            ids = _text_ids(config, len(rows)).to(embeddings.weight.device)
            rows.copy_(embeddings(ids))
        else:
            nn.init.normal_(rows)

    def wrapped(self, inner: Forward) -> Forward:
        def run(input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
            return inner(**self._with_prompt(input_ids, attention_mask, kwargs))

        return run

    def _with_prompt(self, input_ids: Any, attention_mask: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        rows = self.embedding.weight
        count = len(rows)
        # Positions are worked out by the model again: those of the caller do not know of the virtual tokens.
        changed = {
            **kwargs,
            "position_ids": None,
            "cache_position": None,
            "attention_mask": _longer(attention_mask, count),
        }
        changed = {name: value for name, value in changed.items() if value is not None or name in kwargs}
        changed.pop("cache_position", None)
        # Newer models of transformers call it `cache` while they generate.
        cache, embeds = kwargs.get("past_key_values", kwargs.get("cache")), kwargs.get("inputs_embeds")
        if cache is not None and cache.get_seq_length() > 0:
            return {**changed, "input_ids": input_ids}
        if embeds is None:
            if input_ids is None:
                raise ValueError("You have to provide either input_ids or inputs_embeds")
            embeds = self.look_up(input_ids)
        prompt = rows.to(embeds.dtype).expand(embeds.shape[0], -1, -1)
        labels = kwargs.get("labels")
        if labels is not None:
            changed["labels"] = F.pad(labels, (count, 0), value=-100)
        return {**changed, "inputs_embeds": torch.cat([prompt, embeds], dim=1)}

    def prepare(self, base: Any, config: Any, path: str) -> None:
        # A bound method in the instance's dict: the embedding itself must not become a child of this layer.
        self.__dict__["look_up"] = base.get_input_embeddings().__call__


def _longer(mask: Any, count: int) -> Any:
    """The mask with ones in front for the virtual tokens."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError("prompt tuning needs an attention mask of shape (batch, tokens)")
    return F.pad(mask, (count, 0), value=1)


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
        config=PromptTuningConfig,
        prefix="prompt_tuning_",
        tensor_names=frozenset({"prompt_embeddings"}),
        network_layer=PromptTuning,
        check=_check,
        paper="arXiv 2104.08691",
    )
)
