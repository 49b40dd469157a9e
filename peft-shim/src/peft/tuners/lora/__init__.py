"""`peft.tuners.lora`."""

from peft.tuners.lora.layer import LoraLayer as LoraLayer
from splice import LoraConfig as LoraConfig
from splice import LoraRuntimeConfig as LoraRuntimeConfig
