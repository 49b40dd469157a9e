"""`peft.utils`."""

from splice.lazy import lazy_names as _lazy_names

__getattr__, __dir__ = _lazy_names(
    __name__,
    (
        "peft.utils.constants",
        "peft.utils.error",
        "peft.utils.integrations",
        "peft.utils.loftq_utils",
        "peft.utils.other",
        "peft.utils.peft_types",
        "peft.utils.save_and_load",
        "peft.utils.warning",
    ),
)
