"""`peft.tuners.lora.loraga`."""

from splice.methods.lora.loraga import preprocess_loraga as preprocess_loraga
