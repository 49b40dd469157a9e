"""What is peculiar to AdaMSS: groups of rows that are worked out again, and are given up while training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import splice
from tests import bases
from tests.bases import run
from tests.comparing import Pair, assert_close, load_both, trainable_names

BASE = bases.LINEAR


def fields(**more: Any) -> dict[str, Any]:
    return {"peft_type": "ADAMSS", "target_modules": ["first", "second"], "r": 3, "num_subspaces": 3, **more}


SCHEDULE = {"use_asa": True, "asa_target_subspaces": 2, "init_warmup": 1, "final_warmup": 9, "mask_interval": 2}


def train(pair: Pair, steps: range) -> None:
    optimizers = {id(m): torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in each(pair)}
    for step in steps:
        for model in each(pair):
            model(**BASE.inputs(4)).square().sum().backward()
            optimizers[id(model)].step()
            model.base_model.update_and_allocate(step)
            optimizers[id(model)].zero_grad()
        assert trainable_names(pair.ours) == trainable_names(pair.reference), step


def each(pair: Pair) -> tuple[Any, Any]:
    return pair.reference, pair.ours


def test_training_follows_the_reference(shared_checkpoint: Any) -> None:
    """Step by step the same groups are trained, with the same values."""
    pair = load_both(BASE, shared_checkpoint(BASE, fields(**SCHEDULE)), is_trainable=True)
    before = len(trainable_names(pair.ours))
    train(pair, range(8))
    assert 0 < len(trainable_names(pair.ours)) < before
    assert_close(run(pair.ours, BASE.inputs(3)), run(pair.reference, BASE.inputs(3)), factor=10)
    layers = [model.get_base_model().first for model in each(pair)]
    assert {n: len(r) for n, r in layers[1].seg_result["default"].items()} == {
        n: len(r) for n, r in layers[0].seg_result["default"].items()
    }


def test_the_last_group_is_never_given_up() -> None:
    """All of them matter the same while B is zero, and one is what is left."""
    model: Any = splice.get_peft_model(
        BASE.build(), splice.get_peft_config(fields(**{**SCHEDULE, "asa_target_subspaces": 1, "mask_interval": 1}))
    )
    for step in range(10):
        model(**BASE.inputs(4)).square().sum().backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
        assert trainable_names(model)


def test_no_gradients_are_an_error() -> None:
    model: Any = splice.get_peft_model(BASE.build(), splice.get_peft_config(fields(**SCHEDULE)))
    model.base_model.update_and_allocate(0)  # before the schedule begins
    with pytest.raises(RuntimeError, match="needs gradients: call it after `backward` and before `zero_grad`"):
        model.base_model.update_and_allocate(1)


def test_groups_of_another_base_are_refused(checkpoint: Any) -> None:
    folder = checkpoint(BASE, fields())
    base = BASE.build()
    with torch.no_grad():
        base.first.weight.normal_()
    expected = run(base, BASE.inputs(2))
    with pytest.raises(
        RuntimeError, match=r"first: the adapter was trained for groups of \[.*\] rows, and those of this"
    ):
        splice.PeftModel.from_pretrained(base, folder)
    assert torch.equal(run(base, BASE.inputs(2)), expected)


def test_ranks_are_those_of_the_checkpoint(checkpoint: Any) -> None:
    """Whatever the config says of them; the directions are told by it."""
    folder = checkpoint(BASE, fields(subspace_rank=2))
    config = splice.AdamssConfig(r=3, num_subspaces=3, target_modules=["first", "second"])
    models = [splice.PeftModel.from_pretrained(BASE.build(), folder, config=c) for c in (None, config)]
    assert torch.equal(run(models[1], BASE.inputs(3)), run(models[0], BASE.inputs(3)))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.first.adamss_A.0"] = torch.zeros(2, 4)
    save_file(tensors, file)
    with pytest.raises(splice.AdapterMismatchError, match="adamss_A.0"):
        splice.PeftModel.from_pretrained(BASE.build(), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "`r` should be a positive integer"),
        ({"init_weights": "x"}, "init_weights must be 'orthogonal' or None, got x"),
        ({"use_asa": True, "init_warmup": 5, "final_warmup": 5}, r"`init_warmup` \(5\) must be smaller"),
        ({"use_asa": True, "mask_interval": 0}, "`mask_interval` should be a positive integer"),
        ({"use_asa": True, "asa_schedule_exponent": 0}, "`asa_schedule_exponent` must be positive"),
    ],
)
def test_fields_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        splice.get_peft_model(BASE.build(), splice.get_peft_config(fields(**changes)))


def test_a_new_adapter_needs_the_values_of_the_weight() -> None:
    with pytest.raises(NotImplementedError, match="first: a new AdaMSS adapter is made for the values of the weight"):
        splice.get_peft_model(BASE.build().to("meta"), splice.get_peft_config(fields()))
