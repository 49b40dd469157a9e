"""`peft.utils.other`."""

from splice.surgery.isinstance_classes import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
from splice.surgery.isinstance_classes import ModulesToSaveWrapper as ModulesToSaveWrapper
from splice.surgery.isinstance_classes import TrainableTokensWrapper as TrainableTokensWrapper
