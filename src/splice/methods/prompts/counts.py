"""How many virtual tokens a config asks for."""

from __future__ import annotations

from splice.checkpoint.types import TaskType
from splice.config import PromptLearningConfig


def token_count(config: PromptLearningConfig) -> int:
    """The number of virtual tokens, of a config that was checked."""
    assert config.num_virtual_tokens is not None
    return config.num_virtual_tokens


def check_prompt(config: PromptLearningConfig) -> None:
    """Raise ValueError for a config that no prompt-learning method can work with."""
    count = config.num_virtual_tokens
    if not isinstance(count, int) or isinstance(count, bool) or count <= 0:
        raise ValueError(f"`num_virtual_tokens` should be a positive integer, got {count!r}")
    if config.task_type is None:
        raise ValueError(
            f"a {config.peft_type} config needs a `task_type`: it decides where the virtual tokens go. "
            f"One of {', '.join(member.value for member in TaskType)}."
        )
