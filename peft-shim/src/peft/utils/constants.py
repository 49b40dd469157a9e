"""`peft.utils.constants`."""

from splice.checkpoint.source import BIN_NAME as WEIGHTS_NAME
from splice.checkpoint.source import SAFETENSORS_NAME as SAFETENSORS_WEIGHTS_NAME
from splice.config import CONFIG_NAME as CONFIG_NAME

__all__ = ["CONFIG_NAME", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME"]
