"""`peft.utils.other`."""

from splice.surgery.recognised import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
from splice.surgery.recognised import ModulesToSaveWrapper as ModulesToSaveWrapper
