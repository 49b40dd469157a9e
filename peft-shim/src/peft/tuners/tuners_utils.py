"""`peft.tuners.tuners_utils`."""

from splice.surgery.recognised import BaseTunerLayer as BaseTunerLayer
from splice.surgery.tuner import Tuner as BaseTuner

__all__ = ["BaseTuner", "BaseTunerLayer"]
