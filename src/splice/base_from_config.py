"""A base model without weights, made from its config alone: to plan on, or to read its weights when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splice.auto import auto_class_of
from splice.checkpoint.source import looks_like_a_path
from splice.config import PeftConfig
from splice.kinds.reading import Checkpoint
from splice.tasks import PeftModel

# Where a base may be that only its config is needed of.
OF_A_CONFIG = "a folder, the file of a config, or an id of the Hub"


def empty_base(
    place: str,
    checkpoint: Checkpoint,
    labels: int | None = None,
    class_name: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The base that an adapter is for, on the meta device: made from its config, without weights and as if not quantised.

    Args:
        place: a folder, the file of a config, or an id of the Hub.
        checkpoint: the adapter's; it says what the base is for.
        labels: how many labels the head of a classifier has; None for as many as the adapter's own head.
        class_name: of a class of transformers that makes it; None for what the adapter and the config say.
        trust_remote_code: run code that lies beside the config.

    Raises:
        OSError: the config cannot be found.
        ValueError: transformers is not installed, or knows no such base.
    """
    if find_spec("transformers") is None:
        raise ValueError("the base is made from its config by transformers: pip install 'splice[transformers]'")
    check_place(place, "base", OF_A_CONFIG)
    transformers: Any = import_module("transformers")
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    count = _labels(checkpoint) if labels is None else labels
    if count is not None:
        config.num_labels = count
    names = [class_name] if class_name else _classes(config, checkpoint.config)
    # Of transformers itself and nothing else: an adapter is a stranger's, and importing a module runs its code. Not on the
    # meta device: with torch 2.6 what some of these modules import asks tensors of its own for their values.
    known = [found for name in names if (found := model_class(transformers, name)) is not None]
    if class_name is not None and not known:
        raise ValueError(f"transformers has no class {class_name!r} to make the base with")
    with torch.device("meta"):
        return _made(known or [transformers.AutoModel], config, trust_remote_code)


def model_class(library: Any, name: str) -> type | None:
    """The class of models that transformers or diffusers has under this name; None where it is something else, or nothing."""
    # Asked by the name alone: `dir` of them looks at all their modules, which takes longer than all else that is done here.
    found = getattr(library, name, None)
    is_model = isinstance(found, type) and (issubclass(found, nn.Module) or name.startswith("AutoModel"))
    return found if is_model else None


def check_place(place: str, what: str, kinds: str = "a folder or an id of the Hub") -> None:
    """Raise where `place` is not there and can be no id of the Hub, which would be asked in vain.

    Raises:
        ValueError: `what` is not there, which may be one of these `kinds` of places.
    """
    if not Path(place).exists() and looks_like_a_path(place):
        raise ValueError(f"there is no {what} at {place!r}: it is {kinds}")


def _classes(config: Any, adapter: PeftConfig) -> list[str]:
    """What may make the base: by the adapter's task first, else by what either config names."""
    mapping = adapter.auto_mapping or {}
    found = [auto_class_of(adapter), mapping.get("base_model_class"), *(config.architectures or ())]
    return [name for name in found if name]


def _made(classes: Sequence[Any], config: Any, trust_remote_code: bool) -> nn.Module:
    for number, cls in enumerate(classes):
        is_auto = cls.__name__.startswith("AutoModel")
        try:
            made: nn.Module = (
                cls.from_config(config, trust_remote_code=trust_remote_code) if is_auto else cls._from_config(config)
            )
        except ValueError:
            # A model for pictures and text is none of those that its task is otherwise looked up among.
            if not is_auto or number + 1 == len(classes):
                raise
            continue
        return made.eval()
    raise AssertionError("there is always one")


def _labels(checkpoint: Checkpoint) -> int | None:
    """How many labels the head has that an adapter saves whole; None where it saves none."""
    heads = PeftModel.class_for(checkpoint.config).heads
    shapes = [
        entry.shape
        for name, entry in checkpoint.weights.entries.items()
        if name.endswith(".weight") and set(name.split(".")) & set(heads) and len(entry.shape) == 2
    ]
    # Of a head of several layers the last one, in the order of their names, gives the labels.
    return shapes[-1][0] if shapes else None
