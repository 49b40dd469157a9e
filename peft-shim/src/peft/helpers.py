"""`peft.helpers`."""

from splice.helpers import check_if_peft_model as check_if_peft_model
from splice.helpers import disable_input_dtype_casting as disable_input_dtype_casting
from splice.helpers import rescale_adapter_scale as rescale_adapter_scale
from splice.helpers import update_forward_signature as update_forward_signature
from splice.helpers import update_generate_signature as update_generate_signature
from splice.helpers import update_signature as update_signature
from splice.kappatune import KappaTuneSelector as KappaTuneSelector
from splice.kappatune import find_kappa_target_modules as find_kappa_target_modules
from splice.methods.lora.dora_caching import DoraCaching as DoraCaching
from splice.methods.lora.monteclora_training import MontecloraTrainerMixin as MontecloraTrainerMixin
