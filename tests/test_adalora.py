"""AdaLoRA in training: the same budgets, the same pruned ranks and the same values as the reference, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from tests import bases
from tests.bases import Base, run
from tests.comparing import assert_close, config_in, load_both, named, tensors_in

SCHEDULE = {"init_r": 6, "target_r": 3, "total_step": 10, "tinit": 2, "tfinal": 3, "deltaT": 2, "lora_alpha": 9}
places = pytest.mark.parametrize("base", [bases.LINEAR, bases.CONV2D, bases.TRANSPOSED, bases.LLAMA], ids=str)


def config(base: Base, **changes: Any) -> dict[str, Any]:
    named = {"target_modules": list(base.targets), "task_type": base.task}
    return {"peft_type": "ADALORA", **SCHEDULE, **named, **changes}


def step(model: Any, base: Base, number: int) -> float:
    """One step of training, with the loss that the adapter adds."""
    inputs = base.inputs(4)
    if base.task:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    else:
        loss = model(**inputs).square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.sub_(0.1 * parameter.grad)
    model.base_model.update_and_allocate(number)
    model.zero_grad()
    return float(loss.detach())


@places
def test_every_step_is_the_references(base: Base, shared_checkpoint: Any, tmp_path: Path) -> None:
    pair = load_both(base, shared_checkpoint(base, config(base)), is_trainable=True)
    for number in range(10):
        losses = pair.each(lambda model, number=number: step(model, base, number))
        assert losses is None or losses[1] == pytest.approx(losses[0], rel=1e-4)
        theirs = {n: p.detach() for n, p in named(pair.reference) if ".lora_E." in n}
        ours = dict(named(pair.ours))
        for name, tensor in theirs.items():
            assert torch.equal(ours[name].detach() == 0, tensor == 0), (number, name)
            assert_close(ours[name].detach(), tensor, factor=100)
    left = [sum(map(sum, model.peft_config["default"].rank_pattern.values())) for model in (pair.reference, pair.ours)]
    assert left[0] == left[1] == 3 * len(pair.ours.targeted_module_names)
    pair.reference.save_pretrained(str(tmp_path / "peft"))
    pair.ours.save_pretrained(tmp_path / "splice")
    described = [{n: t.shape for n, t in tensors_in(tmp_path / lib).items()} for lib in ("peft", "splice")]
    assert described[0] == described[1]
    assert config_in(tmp_path / "splice") == config_in(tmp_path / "peft")
    again = load_both(base, tmp_path / "splice")
    assert_close(again.assert_equal(), run(pair.ours.eval(), base.inputs(3)), factor=3)


def test_training_goes_on_with_pruned_ranks(shared_checkpoint: Any, tmp_path: Path) -> None:
    """Without looking back: the budget is that of the ranks that are left."""
    base = bases.LINEAR
    model: Any = splice.PeftModel.from_pretrained(
        base.build(), shared_checkpoint(base, config(base)), is_trainable=True
    )
    for number in range(6):
        step(model, base, number)
    model.save_pretrained(tmp_path)
    again: Any = splice.PeftModel.from_pretrained(base.build(), tmp_path, is_trainable=True)
    ranks = {path: len(layer.lora_A) for path, layer in again.base_model.placed["default"].items()}
    assert sum(ranks.values()) < 12
    assert_close(run(again.eval(), base.inputs(3)), run(model.eval(), base.inputs(3)))
    for number in range(6, 10):
        step(again, base, number)
    assert sum(map(sum, again.peft_config["default"].rank_pattern.values())) <= 6


def test_the_orthogonality_of_a_loss(shared_checkpoint: Any) -> None:
    base = bases.LLAMA
    inputs = base.inputs(3)
    pair = load_both(base, shared_checkpoint(base, config(base, orth_reg_weight=0.7)), is_trainable=True)
    theirs, ours = (model(**inputs, labels=inputs["input_ids"]).loss for model in (pair.reference, pair.ours))
    assert_close(ours.detach(), theirs.detach(), factor=3)
    plain = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, config(base)))
    frozen = plain(**inputs, labels=inputs["input_ids"]).loss
    assert ours > frozen  # an adapter that is not trained adds nothing


def test_a_budget_that_prunes_nothing() -> None:
    """The reference fails where the schedule asks for as many ranks as there are."""
    base = bases.LINEAR
    model: Any = splice.get_peft_model(base.build(), splice.get_peft_config(config(base, target_r=6)))
    for number in range(10):
        step(model, base, number)
    assert all(map(all, model.peft_config["default"].rank_pattern.values()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_step": None}, "`total_step` should be a positive integer, got None"),
        ({"total_step": 0}, "`total_step` should be a positive integer, got 0"),
        ({"tinit": 7}, r"leaves no step.*`tinit` \(7\) should be less than `total_step` - `tfinal` \(10 - 3 = 7\)"),
        ({"orth_reg_weight": -1}, "`orth_reg_weight` should not be negative, got -1"),
        ({"use_dora": True}, "ADALORA does not support DoRA"),
    ],
    ids=str,
)
def test_configs_that_are_refused(fields: dict[str, Any], message: str) -> None:
    for library in (peft, splice):
        with pytest.raises(ValueError, match=message if library is splice else ""):
            library.get_peft_config(config(bases.LINEAR, **fields))


def test_refusals() -> None:
    base = bases.LINEAR
    with pytest.raises(ValueError, match="`beta1` should lie between 0 and 1, got 1.0"):
        splice.get_peft_model(base.build(), splice.get_peft_config(config(base, beta1=1.0)))
    model: Any = splice.get_peft_model(base.build(), splice.get_peft_config(config(base)))
    with pytest.raises(ValueError, match="only 1 trainable adapter, and 'default' is one.*`inference_mode`"):
        model.add_adapter("second", splice.get_peft_config(config(base)))
    with pytest.raises(RuntimeError, match="needs gradients: call it after `backward`"):
        model.base_model.update_and_allocate(0)
    frozen = splice.get_peft_config(config(base, inference_mode=True))
    with pytest.raises(ValueError, match="needs an adapter in training"):
        splice.get_peft_model(base.build(), frozen).base_model.update_and_allocate(0)
    grouped = splice.get_peft_config(config(bases.GROUPED))
    with pytest.raises(ValueError, match="not defined on a Conv2d with groups"):
        splice.get_peft_model(bases.GROUPED.build(), grouped)
