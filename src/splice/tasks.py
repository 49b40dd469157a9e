"""What each task class adds: the heads it saves, and the checks of a model that generates."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from splice.config import PeftConfig, TaskType
from splice.model import PeftModel


class PeftModelForCausalLM(PeftModel):
    """A PeftModel of a decoder that continues its input."""

    needs: ClassVar[tuple[str, ...]] = ("prepare_inputs_for_generation",)


class PeftModelForSeq2SeqLM(PeftModel):
    """A PeftModel of an encoder-decoder."""

    needs: ClassVar[tuple[str, ...]] = ("prepare_inputs_for_generation",)


class PeftModelForSequenceClassification(PeftModel):
    """A PeftModel that labels sequences; its head is trained, saved and loaded with the adapter."""

    heads: ClassVar[tuple[str, ...]] = ("classifier", "score")


class PeftModelForTokenClassification(PeftModel):
    """A PeftModel that labels tokens; its head is trained, saved and loaded with the adapter."""

    heads: ClassVar[tuple[str, ...]] = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    """A PeftModel that marks spans; its head is trained, saved and loaded with the adapter."""

    heads: ClassVar[tuple[str, ...]] = ("qa_outputs",)


class PeftModelForFeatureExtraction(PeftModel):
    """A PeftModel that gives hidden states."""


TASK_CLASSES: dict[TaskType, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def class_for(config: PeftConfig, default: type[PeftModel]) -> type[PeftModel]:
    """The class of a PeftModel with this config: by its task type, else `default`."""
    return default if config.task_type is None else TASK_CLASSES[TaskType(config.task_type)]


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Put a new, untrained adapter on `model`, which is changed in place.

    Args:
        model: the base model.
        peft_config: what to put on it. The object is kept, and resolved values (default targets, the base's name) are
            written into it: callers rely on reading them there.
        adapter_name: the adapter's name in memory.
        mixed: for adapters of several methods on one model; not supported.
        autocast_adapter_dtype: hold adapters of half-precision bases in float32.
        revision: revision of the base model, recorded in the config.
        low_cpu_mem_usage: leave the new tensors on the meta device, to be loaded.

    Raises:
        NoMatchingPeftModuleError: the config selects nothing.
        ValueError: the config cannot be applied to a layer that it selects.
    """
    from splice.creating import adopt_base

    if mixed:
        raise NotImplementedError("mixed=True: adapters of several methods on one model are not supported yet")
    adopt_base(peft_config, model, revision)
    cls = class_for(peft_config, PeftModel)
    return cls(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
