"""`peft.mixed_model`."""

from splice.mixed import PeftMixedModel as PeftMixedModel
