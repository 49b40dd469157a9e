"""`peft.utils.error`."""

from splice.errors import NoMatchingPeftModuleError as NoMatchingPeftModuleError
from splice.errors import PeftError as PeftError
