"""`peft.utils.other`."""

from splice import prepare_model_for_kbit_training as prepare_model_for_kbit_training
