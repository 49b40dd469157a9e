"""`peft.tuners.lora.conversion`."""

from splice.constants import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from splice.methods.lora.conversion import convert_to_lora as convert_to_lora
from splice.methods.lora.conversion import save_as_lora as save_as_lora
