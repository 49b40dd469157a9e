"""`peft.optimizers`."""

from splice.lazy import lazy_names as _lazy_names

__getattr__, __dir__ = _lazy_names(
    __name__, ("peft.optimizers.lorafa", "peft.optimizers.loraplus", "peft.optimizers.riemannian")
)
