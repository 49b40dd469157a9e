"""`peft.utils.integrations`."""

from splice.base.zero3 import is_zero3_enabled as check_deepspeed_zero3_enabled  # noqa: F401
from splice.layer_devices import get_layer_device_map as get_layer_device_map
from splice.layer_devices import map_cache_to_layer_device_map as map_cache_to_layer_device_map
from splice.utilities import dequantize_module_weight as dequantize_module_weight
from splice.utilities import gather_params_ctx as gather_params_ctx
