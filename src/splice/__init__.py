"""splice loads any trained PEFT adapter onto any PyTorch base model, and proves that it did.

This is the table of public names. Each is imported when it is first asked for, so `import splice` costs nothing.
"""

from __future__ import annotations

from importlib import import_module

from splice.discovery import public_names

_PUBLIC = {
    "splice.tasks": [
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "get_peft_model",
    ],
    "splice.auto": [
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ],
    "splice.fleet.limits": ["StoreLimits"],
    "splice.fleet.registering": ["Registered"],
    "splice.fleet.stats": ["StoreStats"],
    "splice.fleet.store": ["AdapterStore"],
    "splice.gap": ["BaseGap", "base_gap"],
    "splice.merging_files": ["merge_files"],
    "splice.mixed": ["PeftMixedModel"],
    "splice.injecting": ["inject_adapter_in_model"],
    "splice.checkpoint.types": ["PeftType", "TaskType"],
    "splice.config": ["PeftConfig", "PromptLearningConfig", "get_peft_config"],
    "splice.converting_files": ["convert_files"],
    "splice.errors": [
        "AdapterMismatchError",
        "CheckpointError",
        "NoMatchingPeftModuleError",
        "NoRoomError",
        "PeftError",
        "PeftWarning",
        "UnknownMethodError",
        "UnsupportedFeatureError",
    ],
    "splice.kappatune": ["find_kappa_target_modules"],
    "splice.kbit": ["prepare_model_for_kbit_training"],
    "splice.loading.base_state": ["get_base_model_state_dict", "set_base_model_state_dict"],
    "splice.loading.report": ["LoadReport"],
    "splice.loading.saving": ["get_peft_model_state_dict"],
    "splice.loading.state": ["load_peft_weights", "set_peft_model_state_dict"],
    "splice.status": ["get_layer_status", "get_model_status"],
    "splice.translating_files": ["translate_files"],
    "splice.utilities": ["cast_mixed_precision_params", "shift_tokens_right"],
}
_PLACES = {name: module for module, names in _PUBLIC.items() for name in names}

__version__ = "0.1.0"


# The names that cost one import, of what everybody needs. The methods' own are found by name, and `dir` tells them.
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> object:
    module = _PLACES.get(name)
    if module is None and not name.startswith("_"):
        module = public_names().get(name)
    if module is None:
        raise AttributeError(f"module 'splice' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES, *public_names()})
