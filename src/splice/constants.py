"""Constants that programs import from the reference's `utils`."""

from __future__ import annotations

import torch

from splice.checkpoint.format import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME
from splice.kinds.matching import ALL_LINEAR
from splice.kinds.targets import NO_TARGETS

__all__ = [
    "ALLOWED_COMPUTE_DTYPES",
    "CONFIG_NAME",
    "DUMMY_MODEL_CONFIG",
    "DUMMY_TARGET_MODULES",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "TOKENIZER_CONFIG_NAME",
    "UPCAST_DTYPES",
    "WEIGHTS_NAME",
]

# Files of a checkpoint.
WEIGHTS_NAME = BIN_NAME
SAFETENSORS_WEIGHTS_NAME = SAFETENSORS_NAME
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

# Words that a config may have in the place of module names.
INCLUDE_LINEAR_LAYERS_SHORTHAND = ALL_LINEAR
DUMMY_TARGET_MODULES = NO_TARGETS

# The config of a network that has none.
DUMMY_MODEL_CONFIG = {"model_type": "custom"}

# What embeddings and heads are mostly called.
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]

# From how many names on the reference writes shorter ones into a config. Here they stay as they are.
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20

# Dtypes that layers compute in, and names of those in which tensors are only kept.
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
