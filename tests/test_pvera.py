"""PVeRA's codes: drawn in training, or where the config says so, with the numbers that the reference draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import splice
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


@pytest.mark.parametrize("seed", [None, 3], ids=["of torch", "of its own"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_that_is_computed_again_draws_the_same_numbers(
    seed: int | None, reentrant: bool, shared_checkpoint: Any
) -> None:
    config = {**FIELDS, "generator_seed": seed, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    folder, found = shared_checkpoint(bases.LLAMA, config), []
    for again in (False, True):
        network = bases.LLAMA.build()
        model: Any = splice.PeftModel.from_pretrained(network, folder, is_trainable=True).train()
        if again:
            network.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        for _ in range(2):  # the second with other numbers
            model.zero_grad()
            model(**bases.LLAMA.inputs(2)).logits.square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for whole, computed_again in zip(*found):
        assert_close(computed_again, whole)
