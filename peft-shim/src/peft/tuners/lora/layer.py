"""`peft.tuners.lora.layer`."""

from splice.methods.lora import layers as lora_layers
from splice.surgery.isinstance_classes import layer_of

LoraLayer = layer_of("LoraLayer", lambda adapter: isinstance(adapter, lora_layers.LowRank))
