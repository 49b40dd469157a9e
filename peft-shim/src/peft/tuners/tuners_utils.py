"""`peft.tuners.tuners_utils`."""

from splice.surgery.isinstance_classes import BaseTunerLayer as BaseTunerLayer
from splice.surgery.tuner import Tuner as BaseTuner

__all__ = ["BaseTuner", "BaseTunerLayer"]
