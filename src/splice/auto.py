"""A base model and its adapter from the adapter's place alone: `AutoPeftModelForCausalLM.from_pretrained("user/my-adapter")`.

Each class is named after a task. The config of the adapter says which base it was trained on, and the task, or the config
where it has none, of which class that is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, ClassVar, cast

from torch import nn

from splice.base.foreign_models import can_resize_vocabulary, input_embedding_layer
from splice.checkpoint.source import Source
from splice.checkpoint.types import TaskType
from splice.config import PeftConfig
from splice.tasks import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

# Libraries that a config without a task may name as the one that the base's class is from. A checkpoint is a stranger's, and
# importing a module runs its code.
_TRUSTED = ("diffusers", "lerobot", "megatron-core", "transformers")
_TOKENIZER_CONFIG = "tokenizer_config.json"
# Options that are about the adapter alone. All others go to the base as well: a token, a cache, a device.
_OF_THE_ADAPTER = (
    "autocast_adapter_dtype",
    "ephemeral_gpu_offload",
    "resize_vocabulary",
    "strict",
    "subfolder",
    "torch_device",
)
# What a tokenizer is loaded with, of the options of the adapter that it lies beside.
_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class _AutoPeftModel:
    """Finds the base model of an adapter, loads both, and is never made itself."""

    # The PeftModel of the task.
    _target_peft_class: ClassVar[type[PeftModel]] = PeftModel
    # The class of transformers that finds base models for it; None where the config has to name one.
    _auto_class: ClassVar[str | None] = None

    def __init__(self) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is not made itself: call `{name}.from_pretrained(path_or_hub_id)`.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter was trained on, and the adapter onto it.

        Where a tokenizer lies beside the adapter, and has more tokens than the base, the base gets as many.

        Args:
            pretrained_model_name_or_path: folder of the adapter, or its id on the Hub.
            adapter_name: the adapter's name in memory.
            is_trainable: as in `PeftModel.from_pretrained`.
            config: used instead of the checkpoint's own; it names the base.
            revision: of the adapter on the Hub. That of the base is the one that the config names.
            import_allowlist: further libraries that the config of an adapter without a task may name as the one that the
                base's class is imported from, which runs their code.
            **kwargs: of the base's `from_pretrained` and of `PeftModel.from_pretrained`: `dtype`, `device_map`, `token`...

        Raises:
            ValueError: the adapter is for another task; or its config names no base, no class of the base, or one that is
                from no library of the allowlist.
            As `PeftModel.from_pretrained`.
        """
        options = {**kwargs, **({} if revision is None else {"revision": revision})}
        source = Source.from_options(pretrained_model_name_or_path, kwargs.get("subfolder"), options)
        found = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, **options)
        make = cls._base_class(found, import_allowlist)
        if not found.base_model_name_or_path:
            raise ValueError(
                f"the config of {source.location!r} names no base model (`base_model_name_or_path`): load the base yourself, "
                "and the adapter with `PeftModel.from_pretrained(base, ...)`"
            )
        for_base = {name: value for name, value in kwargs.items() if name not in _OF_THE_ADAPTER}
        base = make(found.base_model_name_or_path, revision=found.revision, **for_base)
        _grow_vocabulary(base, source, options)
        # Without the config that was read above: this one takes config and weights of one commit.
        return cls._target_peft_class.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config, **options
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, allowed: Sequence[str] | None) -> Callable[..., nn.Module]:
        """The `from_pretrained` of the base's class.

        Raises:
            ValueError: there is none that this class may use.
        """
        if config.task_type is None:
            return _named_class(config, allowed)
        if cls._auto_class is None:
            raise ValueError(
                f"Cannot use `{cls.__name__}` with a task type, please use a specific class for your task type. (e.g. "
                f"`AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`); this adapter has {config.task_type!s}."
            )
        needed, asked = PeftModel.class_for(config), cls._target_peft_class
        if needed is not asked:
            raise ValueError(
                f"Expected target PEFT class: {needed.__name__}, but you have asked for: {asked.__name__} make sure that you "
                f"are loading the correct model for your task type: this adapter has {TaskType(config.task_type).value!r}."
            )
        found: Callable[..., nn.Module] = getattr(import_module("transformers"), cls._auto_class).from_pretrained
        return found


def _named_class(config: PeftConfig, allowed: Sequence[str] | None) -> Callable[..., nn.Module]:
    """The `from_pretrained` of the class that the config itself names."""
    mapping = config.auto_mapping
    if not mapping:
        raise ValueError(
            "Cannot infer the auto class from the config, please make sure that you are loading the correct model for your "
            "task type: it has neither `task_type` nor `auto_mapping`. Load the base yourself, and the adapter with "
            "`PeftModel.from_pretrained(base, ...)`."
        )
    library, name = mapping["parent_library"], mapping["base_model_class"]
    trusted = (*_TRUSTED, *(allowed or ()))
    if not any(library == other or library.startswith(f"{other}.") for other in trusted):
        raise ValueError(
            f"The auto mapping wants to import {library!r} which is not in the import allowlist ({', '.join(trusted)}). If "
            f"you are sure that importing this library is safe, specify `import_allowlist=[{library!r}]` in "
            "`from_pretrained()`."
        )
    make = getattr(getattr(import_module(library), name), "from_pretrained", None)
    if make is None:
        raise ValueError(
            f"{library}.{name}, which the config names as the base's class, has no `from_pretrained`: load the base "
            "yourself, and the adapter with `PeftModel.from_pretrained(base, ...)`"
        )
    return cast("Callable[..., nn.Module]", make)


def _grow_vocabulary(base: nn.Module, source: Source, options: dict[str, Any]) -> None:
    """Give `base` as many tokens as the tokenizer beside the adapter has, where it has fewer."""
    embeddings = input_embedding_layer(base)
    weight = None if embeddings is None else embeddings._parameters.get("weight")
    if weight is None or not can_resize_vocabulary(base) or not source.has(_TOKENIZER_CONFIG):
        return
    of_hub = {name: options[name] for name in _OF_THE_HUB if options.get(name) is not None}
    of_hub |= {"trust_remote_code": options.get("trust_remote_code", False)}
    tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(source.location, **of_hub)
    if len(tokenizer) > len(weight):
        cast("Any", base).resize_token_embeddings(len(tokenizer))


class AutoPeftModel(_AutoPeftModel):
    """For adapters whose config names the class of the base, and no task."""


class AutoPeftModelForCausalLM(_AutoPeftModel):
    """For decoders that continue their input."""

    _target_peft_class = PeftModelForCausalLM
    _auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(_AutoPeftModel):
    """For encoder-decoders."""

    _target_peft_class = PeftModelForSeq2SeqLM
    _auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(_AutoPeftModel):
    """For networks that label sequences."""

    _target_peft_class = PeftModelForSequenceClassification
    _auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(_AutoPeftModel):
    """For networks that label tokens."""

    _target_peft_class = PeftModelForTokenClassification
    _auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(_AutoPeftModel):
    """For networks that mark spans."""

    _target_peft_class = PeftModelForQuestionAnswering
    _auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(_AutoPeftModel):
    """For networks that give hidden states."""

    _target_peft_class = PeftModelForFeatureExtraction
    _auto_class = "AutoModel"


def auto_class_of(config: PeftConfig) -> str | None:
    """The class of transformers that finds the bases of adapters with this config; None where none does."""
    wanted = PeftModel.class_for(config)
    return next((cls._auto_class for cls in _AutoPeftModel.__subclasses__() if cls._target_peft_class is wanted), None)
