"""How many virtual tokens a config asks for."""

from __future__ import annotations

from splice.checkpoint.types import TaskType
from splice.config import PromptLearningConfig

# Fields of sizes, which not every config has; most say nothing of them, or 0.
_SIZES = ("num_layers", "token_dim", "num_attention_heads", "num_transformer_submodules", "encoder_hidden_size")


def token_count(config: PromptLearningConfig) -> int:
    """The number of virtual tokens, of a config that was checked."""
    assert config.num_virtual_tokens is not None
    return config.num_virtual_tokens


def check_prompt(config: PromptLearningConfig) -> None:
    """Raise ValueError for a config that no prompt-learning method can work with."""
    count = config.num_virtual_tokens
    if not isinstance(count, int) or isinstance(count, bool) or count <= 0:
        raise ValueError(f"`num_virtual_tokens` should be a positive integer, got {count!r}")
    for name in _SIZES:
        size: int | None = getattr(config, name, None)
        if size is not None and size < 0:
            raise ValueError(f"`{name}` should be a positive integer, got {size}")
    if config.task_type is None:
        raise ValueError(
            f"a {config.peft_type} config needs a `task_type`: it decides where the virtual tokens go. "
            f"One of {', '.join(member.value for member in TaskType)}."
        )
