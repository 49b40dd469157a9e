"""`peft.utils`."""

from peft.utils.constants import CONFIG_NAME as CONFIG_NAME
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import WEIGHTS_NAME as WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
from peft.utils.other import ModulesToSaveWrapper as ModulesToSaveWrapper
from splice import PeftType as PeftType
from splice import TaskType as TaskType
from splice import get_peft_model_state_dict as get_peft_model_state_dict
from splice import load_peft_weights as load_peft_weights
from splice import set_peft_model_state_dict as set_peft_model_state_dict
