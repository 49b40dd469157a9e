"""`peft.utils.loftq_utils`."""

from splice import replace_lora_weights_loftq as replace_lora_weights_loftq
