"""`peft.utils.constants`."""

from splice.checkpoint.format import BIN_NAME as WEIGHTS_NAME
from splice.checkpoint.format import CONFIG_NAME as CONFIG_NAME
from splice.checkpoint.format import SAFETENSORS_NAME as SAFETENSORS_WEIGHTS_NAME

__all__ = ["CONFIG_NAME", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME"]
