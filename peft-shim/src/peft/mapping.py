"""`peft.mapping`."""

from splice import get_peft_config as get_peft_config
from splice import get_peft_model as get_peft_model
from splice import inject_adapter_in_model as inject_adapter_in_model
