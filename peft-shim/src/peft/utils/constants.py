"""`peft.utils.constants`."""

from splice.lazy import lazy_names as _lazy_names

__getattr__, __dir__ = _lazy_names(__name__, ("splice.constants", "splice.default_tables", "splice.prefix_forms"))
