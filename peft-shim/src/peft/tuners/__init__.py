"""`peft.tuners`, with a package for each method."""

from splice.by_method import method_packages as _method_packages
from splice.discovery import public_names as _public_names
from splice.lazy import lazy_names as _lazy_names

__getattr__, __dir__ = _lazy_names(__name__, (_public_names, "splice.by_method"), _method_packages(__name__))
