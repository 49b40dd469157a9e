"""`peft.utils.peft_types`."""

from splice.checkpoint.types import PeftType as PeftType
from splice.checkpoint.types import TaskType as TaskType
