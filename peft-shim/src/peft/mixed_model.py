"""`peft.mixed_model`."""

from splice.constants import DUMMY_MODEL_CONFIG as DUMMY_MODEL_CONFIG
from splice.mixed import PeftMixedModel as PeftMixedModel
