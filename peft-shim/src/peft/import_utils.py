"""`peft.import_utils`."""

from splice.base.backends.installed import *  # noqa: F403
