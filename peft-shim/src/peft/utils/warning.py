"""`peft.utils.warning`."""

from splice.errors import PeftWarning as PeftWarning
