"""splice under the name `peft`. Its names are the public ones of splice and those that follow from the methods."""

from splice.discovery import public_names as _public_names
from splice.lazy import lazy_names as _lazy_names

__version__ = "0.22.0+splice.1"
__getattr__, __dir__ = _lazy_names(__name__, ("splice", _public_names, "splice.by_method", "splice.prefix_forms"))
