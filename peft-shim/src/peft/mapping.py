"""`peft.mapping`."""

from splice.by_method import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from splice.by_method import PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING
from splice.by_method import PEFT_TYPE_TO_MIXED_MODEL_MAPPING as PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from splice.by_method import PEFT_TYPE_TO_PREFIX_MAPPING as PEFT_TYPE_TO_PREFIX_MAPPING
from splice.by_method import PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING
from splice.checkpoint.types import PeftType as PeftType
from splice.config import get_peft_config as get_peft_config
from splice.injecting import inject_adapter_in_model as inject_adapter_in_model
from splice.tasks import get_peft_model as get_peft_model
