"""Whether an adapter fits a base: the plan of a load, made on a base without weights. It needs torch and transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

from torch import nn

from splice.base.bare import original_class
from splice.base.foreign_models import key_renaming
from splice.base_from_config import empty_base
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
        UnknownMethodError: (a KeyError) nobody knows its method here.
        OSError: the base's config cannot be found.
        ValueError: transformers is not installed, or knows no such base.
    """
    place = str(Path(adapter).parent) if Path(adapter).is_file() else adapter
    options = LoadOptions.plain({"subfolder": subfolder, "revision": revision})
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
