"""`peft.utils.other`."""

from splice.surgery.isinstance_classes import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
from splice.surgery.isinstance_classes import ModulesToSaveWrapper as ModulesToSaveWrapper
from splice.surgery.isinstance_classes import TrainableTokensWrapper as TrainableTokensWrapper
from splice.wrapping import fsdp_auto_wrap_policy as fsdp_auto_wrap_policy
