"""`peft.mapping_func`."""

from splice.tasks import get_peft_model as get_peft_model
