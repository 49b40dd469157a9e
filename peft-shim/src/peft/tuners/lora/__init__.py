"""`peft.tuners.lora`. Its parts for which there is no file here are made from the method's record."""

from splice.by_method import PARTS as _PARTS
from splice.lazy import lazy_names as _lazy_names

__getattr__, __dir__ = _lazy_names(__name__, ("peft.tuners.lora.layer",), lambda: _PARTS)
