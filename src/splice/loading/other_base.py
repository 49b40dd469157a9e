"""What a load says about a base that is not the one the adapter was saved with."""

from __future__ import annotations

from torch import nn

from splice.base.bare import original_class
from splice.base.foreign_models import name_or_path
from splice.checkpoint.tensors import Weights
from splice.config import PeftConfig
from splice.errors import counted
from splice.loading.fingerprint import Comparison, Match, compare, fingerprint_of, read_fingerprint
from splice.loading.report import grouped
from splice.surgery.tuner import Tuner


def both_bases(config: PeftConfig, network: nn.Module) -> str:
    """A sentence: which base the adapter names, and which one it was given."""
    given = name_or_path(network) or "no name"
    named = config.base_model_name_or_path or "no base model"
    return f"The adapter names {named!r} as its base; given was a {original_class(network).__name__} ({given})."


def compare_base(tuner: Tuner, weights: Weights, adapter_name: str) -> Comparison:
    """Whether the base below a loaded adapter is the one that its checkpoint was saved with."""
    stored = read_fingerprint(weights.metadata)
    return Comparison(Match.UNKNOWN) if stored is None else compare(stored, fingerprint_of(tuner, adapter_name))


def about_base(found: Comparison, bases: str) -> list[str]:
    """One line for a base that is another one; no line for any other result.

    Args:
        found: how it compares.
        bases: a sentence that names the base the adapter is for, and the given one.
    """
    if found.match is not Match.OTHER_WEIGHTS:
        return _about_forms(found)
    count, shown = len(found.differing), ", ".join(grouped(found.differing)[:3])
    # A base that differs everywhere was exchanged; one that differs here and there was trained. The mends are not the same.
    if count == found.compared:
        cause = "another checkpoint or revision, a fine-tuned base, or one whose weights were never loaded"
    else:
        cause = "layers of the base that were trained, initialised anew, or had another adapter merged into them"
    return [
        f"the base is not the one it was saved with: the weights of {count} of "
        f"{counted(found.compared, 'adapted layer')} differ "
        f"({shown}). Likely: {cause}. {bases} What it computes is not what was trained"
    ]


# What was said of forms in this process: it is the same for each adapter of a family, and for each load of one.
_said: set[tuple[str, str]] = set()


def _about_forms(found: Comparison) -> list[str]:
    """A line for a base that has the same layers and stores them in another way, once for each two ways."""
    if found.forms is None or found.forms in _said:
        return []
    _said.add(found.forms)
    trained, given = (f"stored as {form}" if form else "not quantised" for form in found.forms)
    return [
        f"it was trained on a base that is {trained}, and this one is {given}. It works, and what it computes is a little "
        "off; how much, `splice.base_gap(model, batch, other)` tells, of a batch and the base in the other form"
    ]


def other_architecture(weights: Weights, network: nn.Module) -> str:
    """A sentence about the class of the base that the adapter was saved with, where it is another one."""
    stored = read_fingerprint(weights.metadata)
    if stored is None or stored.architecture == original_class(network).__name__:
        return ""
    return f" It was saved with {stored}."
