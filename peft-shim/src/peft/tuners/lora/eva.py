"""`peft.tuners.lora.eva`."""

from splice.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION as MIN_TARGET_MODULES_FOR_OPTIMIZATION
from splice.methods.lora.eva import forward_fn_dict as forward_fn_dict
from splice.methods.lora.eva import get_eva_state_dict as get_eva_state_dict
from splice.methods.lora.eva import initialize_lora_eva_weights as initialize_lora_eva_weights
from splice.methods.lora.eva import (
    prepare_layer_inputs_fn_language_modeling as prepare_layer_inputs_fn_language_modeling,
)
from splice.methods.lora.eva import (
    prepare_model_inputs_fn_language_modeling as prepare_model_inputs_fn_language_modeling,
)
