"""`peft.utils.other`."""

from splice import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from splice.constants import *  # noqa: F403
from splice.default_tables import *  # noqa: F403
from splice.fsdp import fsdp_auto_wrap_policy as fsdp_auto_wrap_policy
from splice.prefix_forms import *  # noqa: F403
from splice.steps import prepare_prompt_learning_config as _prepare_prompt_learning_config  # noqa: F401
from splice.steps import set_additional_trainable_modules as set_additional_trainable_modules
from splice.steps import set_trainable as _set_trainable  # noqa: F401
from splice.surgery.isinstance_classes import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
from splice.surgery.isinstance_classes import ModulesToSaveWrapper as ModulesToSaveWrapper
from splice.surgery.isinstance_classes import TrainableTokensWrapper as TrainableTokensWrapper
from splice.utilities import cast_mixed_precision_params as cast_mixed_precision_params
from splice.utilities import freeze_adapter as _freeze_adapter  # noqa: F401
from splice.utilities import get_batch_size as _get_batch_size  # noqa: F401
from splice.utilities import get_input_embeddings_name as _get_input_embeddings_name  # noqa: F401
from splice.utilities import get_pattern_key as get_pattern_key
from splice.utilities import get_quantization_config as get_quantization_config
from splice.utilities import get_submodules as _get_submodules  # noqa: F401
from splice.utilities import id_tensor_storage as id_tensor_storage
from splice.utilities import infer_device as infer_device
from splice.utilities import is_valid_match as _is_valid_match  # noqa: F401
from splice.utilities import match_target_against_key as match_target_against_key
from splice.utilities import set_auxiliary_adapter as _set_adapter  # noqa: F401
from splice.utilities import shift_tokens_right as shift_tokens_right
from splice.utilities import str_to_bool as str_to_bool
from splice.utilities import transpose as transpose
