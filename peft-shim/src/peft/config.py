"""`peft.config`."""

from splice.config import PeftConfig as PeftConfig
from splice.config import PromptLearningConfig as PromptLearningConfig
