"""`peft.utils.transformers_weight_conversion`."""

from splice.weight_mapping import build_peft_weight_mapping as build_peft_weight_mapping
