"""`peft.utils.hotswap`."""

from splice.hotswap import check_hotswap_configs_compatible as check_hotswap_configs_compatible
from splice.hotswap import hotswap_adapter as hotswap_adapter
from splice.hotswap import hotswap_adapter_from_state_dict as hotswap_adapter_from_state_dict
from splice.hotswap import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
