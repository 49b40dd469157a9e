"""`peft.tuners.loha.layer`."""

from splice.methods import loha
from splice.surgery.recognised import layer_of

LoHaLayer = layer_of("LoHaLayer", lambda adapter: isinstance(adapter, loha.LoHaLayer))
