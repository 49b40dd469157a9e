"""`peft.optimizers.loraplus`."""

from splice.methods.lora.loraplus import create_loraplus_optimizer as create_loraplus_optimizer
