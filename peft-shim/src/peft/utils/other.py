"""`peft.utils.other`."""

from splice import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from splice.surgery.isinstance_classes import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
from splice.surgery.isinstance_classes import ModulesToSaveWrapper as ModulesToSaveWrapper
from splice.surgery.isinstance_classes import TrainableTokensWrapper as TrainableTokensWrapper
