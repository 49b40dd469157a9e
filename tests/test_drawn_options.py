"""Options of a method together, on targets drawn by chance: splice computes what the reference does, or both refuse."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import splice
from splice.kinds.registry import Method, all_methods
from tests import bases
from tests.bases import Base, run
from tests.comparing import assert_close
from tests.conftest import write_checkpoint
from tests.samples import SAMPLES, Case, supports

PLACES = (bases.LINEAR, bases.EMBEDDING, bases.CONV2D, bases.MIXED, bases.LLAMA, bases.GPT2)
drawing = settings(
    max_examples=8, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


def bases_for(method: Method) -> list[Base]:
    return [base for base in PLACES if supports(method, base)]


@st.composite
def configs(draw: st.DrawFn, method: Method) -> tuple[Base, dict[str, Any]]:
    """A base model, and several of the method's options on some of its targets."""
    base = draw(st.sampled_from(bases_for(method)))
    sample = SAMPLES[method.name]
    chosen = draw(st.lists(st.sampled_from(sorted(sample.options)), unique=True)) if sample.options else []
    assume(all(base.name not in sample.not_on.get(option, ()) for option in chosen))
    fields = Case(method, base).config(**(sample.small if draw(st.booleans()) else {}))
    for option in chosen:
        fields.update(sample.options[option])
    fields["target_modules"] = draw(st.lists(st.sampled_from(base.targets), min_size=1, unique=True))
    return base, fields


@pytest.mark.parametrize(
    "method", [m for m in all_methods().values() if bases_for(m)], ids=lambda method: method.name.value
)
@drawing
@given(data=st.data())
def test_options_together(method: Method, data: st.DataObject) -> None:
    base, fields = data.draw(configs(method))
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            folder = write_checkpoint(Path(name), base, fields)
            theirs = peft.PeftModel.from_pretrained(base.build(), str(folder))
            expected = run(theirs, base.inputs(3))
        except (ValueError, TypeError, NotImplementedError, RuntimeError):
            assume(False)
        ours: Any = splice.PeftModel.from_pretrained(base.build(), folder)
        assert_close(run(ours, base.inputs(3)), expected)
        if all(can_be_merged(layer) for layer in ours.base_model.adapted.values()):
            ours.merge_adapter()
            assert_close(run(ours, base.inputs(3)), expected, factor=20)
            ours.unmerge_adapter()
            assert_close(run(ours, base.inputs(3)), expected)
        with ours.disable_adapter():
            assert torch.equal(run(ours, base.inputs(3)), run(base.build(), base.inputs(3)))


def can_be_merged(adapted: Any) -> bool:
    """Whether the weights of the base layer can hold what its adapter does."""
    layer = adapted.splice_host.layers["default"]
    held = all(adapted._parameters.get(name) is not None for name in layer.changed_names)
    return bool(layer.mergeable and layer.merges_exactly and held)
