"""`peft.utils.peft_types`."""

from splice.checkpoint.types import PeftType as PeftType
from splice.checkpoint.types import TaskType as TaskType
from splice.utilities import register_peft_method as register_peft_method
