"""`peft.import_utils`."""

from splice.installed import *  # noqa: F403
