"""`peft.optimizers.lorafa`."""

from splice.methods.lora.lorafa import LoraFAOptimizer as LoraFAOptimizer
from splice.methods.lora.lorafa import create_lorafa_optimizer as create_lorafa_optimizer
