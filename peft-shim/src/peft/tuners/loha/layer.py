"""`peft.tuners.loha.layer`."""

from splice.methods import loha
from splice.surgery.isinstance_classes import layer_of

LoHaLayer = layer_of("LoHaLayer", lambda adapter: isinstance(adapter, loha.LoHaLayer))
