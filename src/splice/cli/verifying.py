"""Whether an adapter fits a base: the plan of a load, made on a base without weights. It needs torch and transformers."""

from __future__ import annotations

import time
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from splice.auto import auto_class_of
from splice.base.bare import original_class
from splice.base.foreign_models import key_renaming
from splice.config import PeftConfig
from splice.errors import AdapterMismatchError, PeftError
from splice.kinds.reading import Checkpoint
from splice.kinds.registry import method_of
from splice.kinds.shared import SharedTensors
from splice.loading.load import plan_new
from splice.loading.opening import open_checkpoint
from splice.loading.options import LoadOptions
from splice.surgery.tuner import Tuner
from splice.surgery.undo import Undo
from splice.tasks import PeftModel

# What is wrong with a config or with a base, of whichever library it is.
_REFUSALS = (PeftError, ValueError, TypeError, KeyError, NotImplementedError, ImportError)
_OPTIONS = LoadOptions("default", False, True, False, None, True, {}, 0.0)


class Verdict(NamedTuple):
    """Whether an adapter fits a base."""

    # The class of the base.
    base: str
    # How many tensors have their place.
    placed: int
    # How many the adapter has.
    tensors: int
    # Layers that carry them.
    layers: int
    # Why it does not fit, as a load would say it; "" where it does.
    refusal: str = ""
    # Names of tensors that the base needs and the adapter lacks.
    missing: tuple[str, ...] = ()
    # Names of tensors that have no place.
    unexpected: tuple[str, ...] = ()
    # Names of tensors that are of another shape or dtype than their place.
    mismatched: tuple[str, ...] = ()
    # What a load would do otherwise than it is written, or warn of.
    notes: tuple[str, ...] = ()


def verify(adapter: str, subfolder: str | None, revision: str | None, base: str, labels: int | None) -> Verdict:
    """Make the plan for `adapter` on the base that lies at `base`, of which the config alone is read.

    Raises:
        CheckpointError: the adapter cannot be read.
        OSError: the base's config cannot be found.
        ValueError: transformers is not installed, or knows no such base.
    """
    place = str(Path(adapter).parent) if Path(adapter).is_file() else adapter
    options = _OPTIONS._replace(extra={"subfolder": subfolder, "revision": revision}, started=time.perf_counter())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = open_checkpoint(place, None, options, None)
        network = empty_base(base, checkpoint, labels)
        mapping = key_renaming(network)
        if mapping is not None:
            checkpoint = open_checkpoint(place, None, options, mapping)
        verdict = _verdict(network, checkpoint, options)
    said = tuple(str(warning.message) for warning in caught if issubclass(warning.category, UserWarning))
    return verdict._replace(notes=(*verdict.notes, *said))


def _verdict(network: nn.Module, checkpoint: Checkpoint, options: LoadOptions) -> Verdict:
    name, tensors = original_class(network).__name__, len(checkpoint.weights.entries)
    tuner = Tuner.of(network)
    try:
        heads = PeftModel.class_for(checkpoint.config).heads
        found = plan_new(tuner, checkpoint, options, heads, Undo(tuner))
    except AdapterMismatchError as error:
        wrong = (tuple(error.missing), tuple(error.unexpected), tuple(error.mismatched))
        left = tensors - len(error.unexpected) - len(error.mismatched)
        return Verdict(name, left, tensors, 0, str(error), *wrong)
    except _REFUSALS as error:
        return Verdict(name, 0, tensors, 0, str(error))
    plan = found.plan
    layers = sum(not issubclass(placement.layer_class, SharedTensors) for placement in plan.placements)
    notes = (*checkpoint.notes, *found.notes, *found.warnings, *method_of(found.config).loading_notes(found.config))
    return Verdict(name, len(plan.sources), tensors, layers, notes=notes)


def empty_base(place: str, checkpoint: Checkpoint, labels: int | None) -> nn.Module:
    """The base that an adapter is for, on the meta device: made from its config, without weights and as if not quantised.

    Args:
        place: a folder, the file of a config, or an id of the Hub.
        checkpoint: the adapter's; it says what the base is for.
        labels: how many labels the head of a classifier has; None for as many as the adapter's own head.
    """
    if find_spec("transformers") is None:
        raise ValueError("the base is made from its config by transformers: pip install 'splice[transformers]'")
    if not Path(place).exists() and (place.startswith((".", "/", "~")) or place.count("/") > 1):
        raise ValueError(f"there is no base at {place!r}: it is a folder, the file of a config, or an id of the Hub")
    transformers: Any = import_module("transformers")
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(place)
    count = _labels(checkpoint) if labels is None else labels
    if count is not None:
        config.num_labels = count
    with torch.device("meta"):
        made: nn.Module = _maker(transformers, config, checkpoint.config)(config)
    return made


def _maker(transformers: Any, config: Any, adapter: PeftConfig) -> Any:
    """What makes the base: by the adapter's task, else by what either config names, else any class for such a config."""
    auto = auto_class_of(adapter)
    if auto is not None:
        return getattr(transformers, auto).from_config
    mapping = adapter.auto_mapping or {}
    named = [mapping.get("base_model_class"), *(config.architectures or ())]
    # Of transformers itself and nothing else: an adapter is a stranger's, and importing a module runs its code.
    known = [getattr(transformers, name) for name in named if name in dir(transformers)]
    return known[0]._from_config if known else transformers.AutoModel.from_config


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
