"""`peft.peft_model`."""

from splice.by_method import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from splice.by_method import PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING
from splice.by_method import PEFT_TYPE_TO_PREFIX_MAPPING as PEFT_TYPE_TO_PREFIX_MAPPING
from splice.by_method import PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING
from splice.by_method import (
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
)
from splice.constants import DUMMY_MODEL_CONFIG as DUMMY_MODEL_CONFIG
from splice.constants import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from splice.constants import WEIGHTS_NAME as WEIGHTS_NAME
from splice.loading.saving import get_peft_model_state_dict as get_peft_model_state_dict
from splice.loading.state import load_peft_weights as load_peft_weights
from splice.loading.state import set_peft_model_state_dict as set_peft_model_state_dict
from splice.model import PeftModel as PeftModel
from splice.status import LayerStatus as TunerLayerStatus  # noqa: F401
from splice.status import ModelStatus as TunerModelStatus  # noqa: F401
from splice.status import get_layer_status as get_layer_status
from splice.status import get_model_status as get_model_status
from splice.tasks import PeftModelForCausalLM as PeftModelForCausalLM
from splice.tasks import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from splice.tasks import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from splice.tasks import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from splice.tasks import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from splice.tasks import PeftModelForTokenClassification as PeftModelForTokenClassification
