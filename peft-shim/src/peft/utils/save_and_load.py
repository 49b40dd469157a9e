"""`peft.utils.save_and_load`."""

from splice import get_peft_model_state_dict as get_peft_model_state_dict
from splice import load_peft_weights as load_peft_weights
from splice import set_peft_model_state_dict as set_peft_model_state_dict
