"""Virtual tokens that other tensors make while they are trained: how these start, learn, are saved, and go on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from splice.config import get_peft_config
from splice.errors import AdapterMismatchError
from tests import bases
from tests.bases import run
from tests.comparing import assert_close, assert_same_tensors, config_in, named, tensors_in
from tests.samples import Case, network_cases
from tests.task_bases import T5, labels_for


def _is_trained_by_others(case: Case) -> bool:
    layer_class, config = case.method.network_layer, get_peft_config(case.config())
    return layer_class is not None and layer_class.for_training(config) is not layer_class


ALL = network_cases(bases.LLAMA, T5, options=True)
CASES = [case for case in ALL if _is_trained_by_others(case)]
every = pytest.mark.parametrize("case", CASES, ids=str)
# Those as well that are trained as they are stored.
every_one = pytest.mark.parametrize("case", ALL, ids=str)


def new(library: Any, case: Case) -> Any:
    torch.manual_seed(4)
    return library.get_peft_model(case.base.build(), library.get_peft_config(case.config()))


def train(model: Any, case: Case, steps: int) -> list[float]:
    """Losses of as many steps, without an optimizer that remembers anything."""
    inputs = {**case.base.inputs(3), **labels_for(case.base)}
    inputs.setdefault("labels", inputs["input_ids"])
    inputs.pop("decoder_input_ids", None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every
def test_a_new_one_starts_learns_and_is_saved_as_in_the_reference(case: Case, tmp_path: Path) -> None:
    ours, theirs = new(splice, case), new(peft, case)
    tensors = {name: p for name, p in named(theirs) if "prompt_encoder" in name}
    own = {name: p for name, p in named(ours) if "prompt_encoder" in name}
    assert list(own) == list(tensors)
    assert all(torch.equal(own[name], tensor) for name, tensor in tensors.items())
    assert {n: p.requires_grad for n, p in own.items()} == {n: p.requires_grad for n, p in tensors.items()}
    assert train(ours, case, 3) == pytest.approx(train(theirs, case, 3), rel=1e-4)
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(str(tmp_path / name))
    saved, expected = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    assert_close(saved["prompt_embeddings"], expected["prompt_embeddings"], factor=10)
    assert config_in(tmp_path / "ours") == config_in(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(case.base.build(), str(tmp_path / "ours"))
    assert_close(run(again, case.base.inputs(3)), run(ours.eval(), case.base.inputs(3)))


def steps(model: Any, case: Case, optimizer: torch.optim.Optimizer, count: int, seed: int) -> list[float]:
    """Losses of as many steps in training mode, with dropout where there is some."""
    inputs = {**case.base.inputs(3), **labels_for(case.base)}
    inputs.setdefault("labels", inputs["input_ids"])
    inputs.pop("decoder_input_ids", None)
    torch.manual_seed(seed)
    losses = []
    for _ in range(count):
        loss = model.train()(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(model: Any) -> torch.optim.Optimizer:
    """Which remembers what every parameter has been through, by its place among them."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.parametrize("way", ["loaded", "over a new one"])
@every_one
def test_training_goes_on_as_if_it_had_never_stopped(case: Case, way: str, tmp_path: Path) -> None:
    """From the checkpoint and the optimizer's state, as a trainer resumes: loaded, or over an adapter that is made anew."""
    model = new(splice, case)
    optimizer = adam(model)
    first = steps(model, case, optimizer, 2, seed=1)
    model.save_pretrained(tmp_path)
    remembered = copy.deepcopy(optimizer.state_dict())
    unbroken = steps(model, case, optimizer, 3, seed=2)
    assert first[0] != unbroken[0]
    if way == "loaded":
        again: Any = splice.PeftModel.from_pretrained(case.base.build(), tmp_path, is_trainable=True)
    else:
        torch.manual_seed(9)
        again = splice.get_peft_model(case.base.build(), get_peft_config(case.config()))
        again.load_adapter(tmp_path, "default", is_trainable=True)
    resumed = adam(again)
    resumed.load_state_dict(remembered)
    assert steps(again, case, resumed, 3, seed=2) == unbroken
    assert_same_tensors(splice.get_peft_model_state_dict(again), splice.get_peft_model_state_dict(model))


@every_one
def test_what_a_trainer_gathered_is_saved_as_if_it_were_on_the_model(case: Case, tmp_path: Path) -> None:
    """Averaged weights, say: the virtual tokens are those that they make, not those of the model."""
    model, other = new(splice, case), new(splice, case)
    gathered = {name: tensor * 1.1 for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=gathered)
    other.load_state_dict(gathered)
    other.save_pretrained(tmp_path / "own")
    assert_same_tensors(tensors_in(tmp_path / "given"), tensors_in(tmp_path / "own"))
    assert_same_tensors(model.state_dict(), before)


@every
def test_weights_are_loaded_over_one_in_training(case: Case, tmp_path: Path) -> None:
    """As a trainer does that goes back to its best checkpoint."""
    model = new(splice, case)
    model.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in splice.get_peft_model_state_dict(model).items()}
    train(model, case, 1)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same_tensors(splice.get_peft_model_state_dict(model), before)
    assert train(model, case, 1)


@every
def test_loaded_to_be_used_it_is_the_virtual_tokens_alone(case: Case, tmp_path: Path) -> None:
    model = new(splice, case)
    train(model, case, 1)
    model.save_pretrained(tmp_path / "all")
    loaded = splice.PeftModel.from_pretrained(case.base.build(), tmp_path / "all")
    assert torch.equal(run(loaded, case.base.inputs(3)), run(model.eval(), case.base.inputs(3)))
    assert loaded.load_report.placed == loaded.load_report.expected
    loaded.save_pretrained(tmp_path / "tokens")
    assert list(tensors_in(tmp_path / "tokens")) == ["prompt_embeddings"]
    loaded.load_adapter(tmp_path / "all", "default")


@every
def test_what_the_reference_saved_is_trained_itself(case: Case, tmp_path: Path) -> None:
    new(peft, case).save_pretrained(str(tmp_path))
    model = splice.PeftModel.from_pretrained(case.base.build(), tmp_path, is_trainable=True).train()
    losses = train(model, case, 3)
    assert losses[-1] < losses[0]
    in_training = new(splice, case)
    before = copy.deepcopy(splice.get_peft_model_state_dict(in_training))
    with pytest.raises(AdapterMismatchError, match=r"prompt_encoder\."):
        in_training.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same_tensors(splice.get_peft_model_state_dict(in_training), before)


@every
def test_the_virtual_tokens_alone_are_refused_by_one_in_training(case: Case) -> None:
    model = new(splice, case)
    before = copy.deepcopy(splice.get_peft_model_state_dict(model))
    given = {"prompt_embeddings": before["prompt_embeddings"] + 1}
    with pytest.raises(
        ValueError, match="adapter 'default': 'prompt_embeddings' is what comes of the tensors that it trains"
    ):
        splice.set_peft_model_state_dict(model, given)
    assert_same_tensors(splice.get_peft_model_state_dict(model), before)


@every
def test_an_empty_one_is_filled_with_all_it_is_made_of(case: Case, tmp_path: Path) -> None:
    trained = new(splice, case)
    train(trained, case, 1)
    trained.save_pretrained(tmp_path)
    expected = run(trained.eval(), case.base.inputs(2))
    for fill in ("load_adapter", "set_peft_model_state_dict"):
        empty: Any = splice.get_peft_model(
            case.base.build(), get_peft_config(case.config()), low_cpu_mem_usage=True
        ).eval()
        with pytest.raises(RuntimeError, match="the adapter's tensors are on the meta device"):
            run(empty, case.base.inputs(2))
        if fill == "load_adapter":
            empty.load_adapter(tmp_path, "default")
        else:
            splice.set_peft_model_state_dict(empty, splice.load_peft_weights(tmp_path))
        assert torch.equal(run(empty, case.base.inputs(2)), expected)
