"""`peft.utils.save_and_load`."""

from splice.by_method import PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING
from splice.constants import EMBEDDING_LAYER_NAMES as EMBEDDING_LAYER_NAMES
from splice.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as INCLUDE_LINEAR_LAYERS_SHORTHAND
from splice.constants import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from splice.constants import WEIGHTS_NAME as WEIGHTS_NAME
from splice.loading.saving import get_peft_model_state_dict as get_peft_model_state_dict
from splice.loading.state import load_peft_weights as load_peft_weights
from splice.loading.state import set_peft_model_state_dict as set_peft_model_state_dict
from splice.utilities import get_embedding_layer_name as get_embedding_layer_name
from splice.utilities import has_valid_embedding_base_layer as has_valid_embedding_base_layer
