"""`peft.config`."""

from splice.checkpoint.format import CONFIG_NAME as CONFIG_NAME
from splice.checkpoint.types import PeftType as PeftType
from splice.checkpoint.types import TaskType as TaskType
from splice.config import PeftConfig as PeftConfig
from splice.config import PeftConfig as PeftConfigMixin  # noqa: F401
from splice.config import PromptLearningConfig as PromptLearningConfig
