"""splice loads any trained PEFT adapter onto any PyTorch base model, and proves that it did.

This is the table of public names. Each is imported when it is first asked for, so `import splice` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

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
    "splice.mixed": ["PeftMixedModel"],
    "splice.injecting": ["inject_adapter_in_model"],
    "splice.checkpoint.types": ["PeftType", "TaskType"],
    "splice.config": ["PeftConfig", "PromptLearningConfig", "get_peft_config"],
    "splice.errors": [
        "AdapterMismatchError",
        "CheckpointError",
        "NoMatchingPeftModuleError",
        "PeftError",
        "PeftWarning",
        "UnknownMethodError",
        "UnsupportedFeatureError",
    ],
    "splice.loading.report": ["LoadReport"],
    "splice.loading.saving": ["get_peft_model_state_dict"],
    "splice.loading.state": ["load_peft_weights", "set_peft_model_state_dict"],
    "splice.status": ["get_layer_status", "get_model_status"],
}
_PLACES = {name: module for module, names in _PUBLIC.items() for name in names}

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(import_module(_PLACES[name]), name)
    elif name == "__all__":
        value = sorted({*_PLACES, *_of_methods()})
    elif not name.startswith("_") and name in _of_methods():
        value = _of_methods()[name]
    else:
        raise AttributeError(f"module 'splice' has no attribute {name!r}")
    globals()[name] = value
    return value


def _of_methods() -> dict[str, type]:
    """Every method brings a config, and stands in no list."""
    found: dict[str, type] = import_module("splice.kinds.registry").public_classes()
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES, *_of_methods()})
