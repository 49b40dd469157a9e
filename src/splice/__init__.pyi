# Written by `make docs`: the public names with their types, for editors and type checkers.
# isort: skip_file

from splice.auto import AutoPeftModel as AutoPeftModel
from splice.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from splice.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from splice.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from splice.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from splice.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
from splice.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
from splice.base.decoder_input import shift_tokens_right as shift_tokens_right
from splice.checkpoint.types import PeftType as PeftType
from splice.checkpoint.types import TaskType as TaskType
from splice.config import PeftConfig as PeftConfig
from splice.config import PromptLearningConfig as PromptLearningConfig
from splice.config import get_peft_config as get_peft_config
from splice.converting_files import convert_files as convert_files
from splice.errors import AdapterMismatchError as AdapterMismatchError
from splice.errors import CheckpointError as CheckpointError
from splice.errors import NoMatchingPeftModuleError as NoMatchingPeftModuleError
from splice.errors import NoRoomError as NoRoomError
from splice.errors import PeftError as PeftError
from splice.errors import PeftWarning as PeftWarning
from splice.errors import UnknownMethodError as UnknownMethodError
from splice.errors import UnsupportedFeatureError as UnsupportedFeatureError
from splice.fleet.limits import StoreLimits as StoreLimits
from splice.fleet.registering import Registered as Registered
from splice.fleet.stats import StoreStats as StoreStats
from splice.fleet.store import AdapterStore as AdapterStore
from splice.gap import BaseGap as BaseGap
from splice.gap import base_gap as base_gap
from splice.injecting import inject_adapter_in_model as inject_adapter_in_model
from splice.kappatune import find_kappa_target_modules as find_kappa_target_modules
from splice.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from splice.loading.base_state import get_base_model_state_dict as get_base_model_state_dict
from splice.loading.base_state import set_base_model_state_dict as set_base_model_state_dict
from splice.loading.report import LoadReport as LoadReport
from splice.loading.saving import get_peft_model_state_dict as get_peft_model_state_dict
from splice.loading.state import load_peft_weights as load_peft_weights
from splice.loading.state import set_peft_model_state_dict as set_peft_model_state_dict
from splice.merging_files import merge_files as merge_files
from splice.methods.adalora.layers import AdaLoraConfig as AdaLoraConfig
from splice.methods.adamss.config import AdamssConfig as AdamssConfig
from splice.methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
from splice.methods.beft import BeftConfig as BeftConfig
from splice.methods.boft import BOFTConfig as BOFTConfig
from splice.methods.c3a import C3AConfig as C3AConfig
from splice.methods.deft import DeftConfig as DeftConfig
from splice.methods.delora import DeloraConfig as DeloraConfig
from splice.methods.fourierft import FourierFTConfig as FourierFTConfig
from splice.methods.frod.config import FrodConfig as FrodConfig
from splice.methods.glora import GloraConfig as GloraConfig
from splice.methods.gralora import GraloraConfig as GraloraConfig
from splice.methods.hira import HiraConfig as HiraConfig
from splice.methods.hra import HRAConfig as HRAConfig
from splice.methods.ia3 import IA3Config as IA3Config
from splice.methods.lily import LilyConfig as LilyConfig
from splice.methods.ln_tuning import LNTuningConfig as LNTuningConfig
from splice.methods.lora.arrow_building import create_arrow_model as create_arrow_model
from splice.methods.lora.config import LoraConfig as LoraConfig
from splice.methods.lora.config import LoraRuntimeConfig as LoraRuntimeConfig
from splice.methods.lora.conversion import convert_to_lora as convert_to_lora
from splice.methods.lora.conversion import save_as_lora as save_as_lora
from splice.methods.lora.corda import preprocess_corda as preprocess_corda
from splice.methods.lora.eva import get_eva_state_dict as get_eva_state_dict
from splice.methods.lora.eva import initialize_lora_eva_weights as initialize_lora_eva_weights
from splice.methods.lora.loftq_replacing import replace_lora_weights_loftq as replace_lora_weights_loftq
from splice.methods.lora.lorafa import create_lorafa_optimizer as create_lorafa_optimizer
from splice.methods.lora.loraga import preprocess_loraga as preprocess_loraga
from splice.methods.lora.loraplus import create_loraplus_optimizer as create_loraplus_optimizer
from splice.methods.lora.riemannian import create_riemannian_optimizer as create_riemannian_optimizer
from splice.methods.lora.subconfigs import ArrowConfig as ArrowConfig
from splice.methods.lora.subconfigs import BdLoraConfig as BdLoraConfig
from splice.methods.lora.subconfigs import CordaConfig as CordaConfig
from splice.methods.lora.subconfigs import EvaConfig as EvaConfig
from splice.methods.lora.subconfigs import KasaConfig as KasaConfig
from splice.methods.lora.subconfigs import LoftQConfig as LoftQConfig
from splice.methods.lora.subconfigs import LoraGAConfig as LoraGAConfig
from splice.methods.lora.subconfigs import MontecloraConfig as MontecloraConfig
from splice.methods.lora.subconfigs import VeloraConfig as VeloraConfig
from splice.methods.lycoris.loha import LoHaConfig as LoHaConfig
from splice.methods.lycoris.lokr import LoKrConfig as LoKrConfig
from splice.methods.miss import MissConfig as MissConfig
from splice.methods.oft.config import OFTConfig as OFTConfig
from splice.methods.osf import OSFConfig as OSFConfig
from splice.methods.peanut import PeanutConfig as PeanutConfig
from splice.methods.poly import PolyConfig as PolyConfig
from splice.methods.prompts.cartridge.cartridge import CartridgeConfig as CartridgeConfig
from splice.methods.prompts.cartridge.composing import compose_cartridge_adapters as compose_cartridge_adapters
from splice.methods.prompts.cartridge.prefilling import (
    initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
)
from splice.methods.prompts.cartridge.prefilling import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
from splice.methods.prompts.cartridge.prefilling import (
    prompt_embeddings_from_past_key_values as prompt_embeddings_from_past_key_values,
)
from splice.methods.prompts.cpt import CPTConfig as CPTConfig
from splice.methods.prompts.multitask_prompt_tuning import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
from splice.methods.prompts.multitask_prompt_tuning import MultitaskPromptTuningInit as MultitaskPromptTuningInit
from splice.methods.prompts.p_tuning import PromptEncoderConfig as PromptEncoderConfig
from splice.methods.prompts.p_tuning import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
from splice.methods.prompts.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
from splice.methods.prompts.prompt_tuning import PromptTuningConfig as PromptTuningConfig
from splice.methods.prompts.prompt_tuning import PromptTuningInit as PromptTuningInit
from splice.methods.prompts.starts import StartedConfig as StartedConfig
from splice.methods.psoft import PsoftConfig as PsoftConfig
from splice.methods.pvera import PveraConfig as PveraConfig
from splice.methods.randlora import RandLoraConfig as RandLoraConfig
from splice.methods.road import RoadConfig as RoadConfig
from splice.methods.shadow.config import ShadowConfig as ShadowConfig
from splice.methods.shira.mask_functions import random_mask as random_mask
from splice.methods.shira.record import ShiraConfig as ShiraConfig
from splice.methods.supertuning import SupertuningConfig as SupertuningConfig
from splice.methods.tinylora import TinyLoraConfig as TinyLoraConfig
from splice.methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
from splice.methods.unilora import UniLoraConfig as UniLoraConfig
from splice.methods.vblora import VBLoRAConfig as VBLoRAConfig
from splice.methods.vera import VeraConfig as VeraConfig
from splice.methods.waveft.record import WaveFTConfig as WaveFTConfig
from splice.methods.xlora.config import XLoraConfig as XLoraConfig
from splice.mixed import PeftMixedModel as PeftMixedModel
from splice.model import PeftModel as PeftModel
from splice.status import get_layer_status as get_layer_status
from splice.status import get_model_status as get_model_status
from splice.tasks import PeftModelForCausalLM as PeftModelForCausalLM
from splice.tasks import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from splice.tasks import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from splice.tasks import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from splice.tasks import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from splice.tasks import PeftModelForTokenClassification as PeftModelForTokenClassification
from splice.tasks import get_peft_model as get_peft_model
from splice.translating_files import translate_files as translate_files
from splice.utilities import cast_mixed_precision_params as cast_mixed_precision_params

__version__: str
__all__ = [
    "AdapterMismatchError",
    "AdapterStore",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BaseGap",
    "CheckpointError",
    "LoadReport",
    "NoMatchingPeftModuleError",
    "NoRoomError",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PromptLearningConfig",
    "Registered",
    "StoreLimits",
    "StoreStats",
    "TaskType",
    "UnknownMethodError",
    "UnsupportedFeatureError",
    "base_gap",
    "cast_mixed_precision_params",
    "convert_files",
    "find_kappa_target_modules",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "merge_files",
    "prepare_model_for_kbit_training",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "translate_files",
]
