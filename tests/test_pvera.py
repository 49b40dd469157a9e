"""PVeRA's codes: drawn in training, or where the config says so, with the numbers that the reference draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import bases
from tests.bases import run
from tests.comparing import assert_close, differ, load_both

FIELDS = {"peft_type": "PVERA", "r": 4, "d_initial": 0.3, "target_modules": ["first", "second"]}


@pytest.mark.parametrize("seed", [None, 3], ids=["of torch", "of its own"])
@pytest.mark.parametrize("sampled", [False, True], ids=["in training", "always"])
def test_the_numbers_are_the_references(seed: int | None, sampled: bool, shared_checkpoint: Any) -> None:
    base = bases.LINEAR
    folder = shared_checkpoint(base, {**FIELDS, "generator_seed": seed, "sample_at_inference": sampled})
    pair = load_both(base, folder, is_trainable=not sampled)
    if not sampled:
        pair.each(lambda model: model.train())
    outputs = []
    for model in (pair.reference, pair.ours):
        torch.manual_seed(1)
        outputs.append([run(model, base.inputs(3)) for _ in range(2)])
    for ours, theirs in zip(outputs[1], outputs[0]):
        assert_close(ours, theirs)
    assert differ(outputs[1][0], outputs[1][1])


def test_merged_is_the_mean(shared_checkpoint: Any) -> None:
    base = bases.LINEAR
    pair = load_both(base, shared_checkpoint(base, FIELDS))
    expected = pair.assert_equal()
    pair.ours.merge_adapter()
    assert_close(run(pair.ours, base.inputs(3)), expected)
