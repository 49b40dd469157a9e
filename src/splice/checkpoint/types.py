"""The words of the format: what a config file may say in `peft_type` and in `task_type`.

They are spellings on disk, so they stand with the files: whoever only reads checkpoints needs neither configs nor methods.
"""

from __future__ import annotations

from enum import Enum


class PeftType(str, Enum):
    """Every kind of adapter that a checkpoint can name. Members equal their upper-case string."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    BEFT = "BEFT"
    BOFT = "BOFT"
    C3A = "C3A"
    CARTRIDGE = "CARTRIDGE"
    CPT = "CPT"
    DEFT = "DEFT"
    DELORA = "DELORA"
    FOURIERFT = "FOURIERFT"
    FROD = "FROD"
    GLORA = "GLORA"
    GRALORA = "GRALORA"
    HIRA = "HIRA"
    HRA = "HRA"
    IA3 = "IA3"
    LILY = "LILY"
    LN_TUNING = "LN_TUNING"
    LOHA = "LOHA"
    LOKR = "LOKR"
    MISS = "MISS"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    OFT = "OFT"
    OSF = "OSF"
    P_TUNING = "P_TUNING"
    PEANUT = "PEANUT"
    POLY = "POLY"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    PSOFT = "PSOFT"
    PVERA = "PVERA"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    SHADOW = "SHADOW"
    SHIRA = "SHIRA"
    SUPERTUNING = "SUPERTUNING"
    TINYLORA = "TINYLORA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    UNILORA = "UNILORA"
    VBLORA = "VBLORA"
    VERA = "VERA"
    WAVEFT = "WAVEFT"
    XLORA = "XLORA"

    __str__ = Enum.__str__
    __hash__ = str.__hash__


class TaskType(str, Enum):
    """What the base model is for; it selects the class of the PeftModel."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    __str__ = Enum.__str__
    __hash__ = str.__hash__
