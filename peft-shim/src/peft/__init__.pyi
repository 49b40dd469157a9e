# Written by `make docs`: the public names with their types, for editors and type checkers.
# isort: skip_file

from typing import Any

from splice import AdaLoraConfig as AdaLoraConfig
from splice import AdapterMismatchError as AdapterMismatchError
from splice import ArrowConfig as ArrowConfig
from splice import AutoPeftModel as AutoPeftModel
from splice import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from splice import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from splice import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from splice import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from splice import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
from splice import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
from splice import BdLoraConfig as BdLoraConfig
from splice import CheckpointError as CheckpointError
from splice import CordaConfig as CordaConfig
from splice import EvaConfig as EvaConfig
from splice import FourierFTConfig as FourierFTConfig
from splice import IA3Config as IA3Config
from splice import KasaConfig as KasaConfig
from splice import LNTuningConfig as LNTuningConfig
from splice import LoHaConfig as LoHaConfig
from splice import LoKrConfig as LoKrConfig
from splice import LoadReport as LoadReport
from splice import LoftQConfig as LoftQConfig
from splice import LoraConfig as LoraConfig
from splice import LoraGAConfig as LoraGAConfig
from splice import LoraRuntimeConfig as LoraRuntimeConfig
from splice import MontecloraConfig as MontecloraConfig
from splice import NoMatchingPeftModuleError as NoMatchingPeftModuleError
from splice import OFTConfig as OFTConfig
from splice import PeftConfig as PeftConfig
from splice import PeftError as PeftError
from splice import PeftMixedModel as PeftMixedModel
from splice import PeftModel as PeftModel
from splice import PeftModelForCausalLM as PeftModelForCausalLM
from splice import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from splice import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from splice import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from splice import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from splice import PeftModelForTokenClassification as PeftModelForTokenClassification
from splice import PeftType as PeftType
from splice import PeftWarning as PeftWarning
from splice import PrefixTuningConfig as PrefixTuningConfig
from splice import PromptEncoderConfig as PromptEncoderConfig
from splice import PromptLearningConfig as PromptLearningConfig
from splice import PromptTuningConfig as PromptTuningConfig
from splice import PromptTuningInit as PromptTuningInit
from splice import TaskType as TaskType
from splice import TrainableTokensConfig as TrainableTokensConfig
from splice import UnknownMethodError as UnknownMethodError
from splice import UnsupportedFeatureError as UnsupportedFeatureError
from splice import VeloraConfig as VeloraConfig
from splice import VeraConfig as VeraConfig
from splice import cast_mixed_precision_params as cast_mixed_precision_params
from splice import convert_to_lora as convert_to_lora
from splice import create_arrow_model as create_arrow_model
from splice import create_lorafa_optimizer as create_lorafa_optimizer
from splice import create_loraplus_optimizer as create_loraplus_optimizer
from splice import create_riemannian_optimizer as create_riemannian_optimizer
from splice import get_base_model_state_dict as get_base_model_state_dict
from splice import get_eva_state_dict as get_eva_state_dict
from splice import get_layer_status as get_layer_status
from splice import get_model_status as get_model_status
from splice import get_peft_config as get_peft_config
from splice import get_peft_model as get_peft_model
from splice import get_peft_model_state_dict as get_peft_model_state_dict
from splice import initialize_lora_eva_weights as initialize_lora_eva_weights
from splice import inject_adapter_in_model as inject_adapter_in_model
from splice import load_peft_weights as load_peft_weights
from splice import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from splice import preprocess_corda as preprocess_corda
from splice import preprocess_loraga as preprocess_loraga
from splice import save_as_lora as save_as_lora
from splice import set_base_model_state_dict as set_base_model_state_dict
from splice import set_peft_model_state_dict as set_peft_model_state_dict
from splice import shift_tokens_right as shift_tokens_right

__version__: str

def __getattr__(name: str) -> Any: ...
