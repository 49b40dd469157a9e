"""`peft.utils.integrations`."""

from splice.utilities import dequantize_module_weight as dequantize_module_weight
