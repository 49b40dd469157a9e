"""`peft.tuners.lokr.layer`."""

from splice.methods import lokr
from splice.methods.lokr import split as factorization
from splice.surgery.isinstance_classes import layer_of

__all__ = ["LoKrLayer", "factorization"]

LoKrLayer = layer_of("LoKrLayer", lambda adapter: isinstance(adapter, lokr.LoKrLayer))
