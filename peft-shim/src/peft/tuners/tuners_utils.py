"""`peft.tuners.tuners_utils`."""

from splice.buffer_dict import BufferDict as BufferDict
from splice.by_method import PEFT_TYPE_TO_PREFIX_MAPPING as PEFT_TYPE_TO_PREFIX_MAPPING
from splice.constants import *  # noqa: F403
from splice.functional import cast_adapter_dtype as cast_adapter_dtype
from splice.functional import delete_adapter as delete_adapter
from splice.functional import set_adapter as set_adapter
from splice.functional import set_requires_grad as set_requires_grad
from splice.surgery.isinstance_classes import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
from splice.surgery.isinstance_classes import BaseTunerLayer as BaseTunerLayer
from splice.surgery.tuner import Tuner as BaseTuner  # noqa: F401
from splice.utilities import check_adapters_to_merge as check_adapters_to_merge
from splice.utilities import check_target_module_exists as check_target_module_exists
from splice.utilities import find_parameter_name_by_module as find_parameter_name_by_module
from splice.utilities import get_submodules as _get_submodules  # noqa: F401
from splice.utilities import inspect_matched_modules as inspect_matched_modules
from splice.utilities import match_target_against_key as match_target_against_key
from splice.utilities import onload_layer as onload_layer
from splice.utilities import replicate_layers as replicate_layers
