"""`peft.functional`."""

from splice.functional import *  # noqa: F403
