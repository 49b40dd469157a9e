"""Poly beside the reference: every call says the tasks of its rows, so the generic tests do not reach it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import splice
from tests import bases
from tests.comparing import assert_close, differ

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "parts": {"n_splits": 2},
    "several tasks": {"n_tasks": 3},
    "uninitialised": {"init_weights": False},
}
TASKS = torch.tensor([2, 0, 1])


def config(library: Any, **fields: Any) -> Any:
    own = {"r": 2, "n_tasks": 3, "n_skills": 3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return library.PolyConfig(**{**own, **fields})


@pytest.fixture(params=OPTIONS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of the reference."""
    torch.manual_seed(1)
    model = peft.get_peft_model(bases.LLAMA.build(), config(peft, **OPTIONS[request.param]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "poly")
    return tmp_path / "poly"


def both(folder: Path, **options: Any) -> tuple[Any, Any]:
    ours = splice.PeftModel.from_pretrained(bases.LLAMA.build(), folder, **options)
    return ours, peft.PeftModel.from_pretrained(bases.LLAMA.build(), str(folder), **options)


def output(model: Any, tasks: torch.Tensor | None = TASKS, rows: int = 3, **options: Any) -> torch.Tensor:
    given = {} if tasks is None else {"task_ids": tasks}
    found: torch.Tensor = model(**bases.LLAMA.inputs(rows), **given, **options).logits
    return found


def test_output_tokens_and_files_are_the_references(folder: Path, tmp_path: Path) -> None:
    ours, theirs = both(folder)
    assert_close(output(ours), output(theirs))
    assert differ(output(ours), output(ours, TASKS.flip(0)))
    ids = bases.LLAMA.inputs(3)["input_ids"]
    made = [m.generate(input_ids=ids, task_ids=TASKS, max_new_tokens=4, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(*made)
    with ours.disable_adapter():
        assert torch.equal(output(ours, None), bases.LLAMA.build()(**bases.LLAMA.inputs(3)).logits)
    ours.save_pretrained(tmp_path / "again")
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert_close(output(both(tmp_path / "again")[1]), output(theirs))


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_the_references(folder: Path, training: bool) -> None:
    found = []
    for model in both(folder, is_trainable=True):
        model.train(training)
        torch.manual_seed(3)  # how skills are mixed is drawn, in training
        output(model).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, factor=10)


def test_a_new_adapter_begins_as_in_the_reference(folder: Path) -> None:
    states = []
    for library in (splice, peft):
        torch.manual_seed(5)
        states.append(library.get_peft_model_state_dict(library.get_peft_model(bases.LLAMA.build(), config(library))))
    ours, theirs = states
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_several_adapters_and_rows(folder: Path) -> None:
    ours, theirs = both(folder)
    for model in (ours, theirs):
        model.add_adapter("second", config(splice if model is ours else peft, init_weights=False))
    second = splice.get_peft_model_state_dict(ours, adapter_name="second")
    peft.set_peft_model_state_dict(theirs, second, adapter_name="second")
    ours.eval(), theirs.eval()
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "second"])
    assert_close(output(ours), output(theirs))
    ours.set_adapter("default")
    mixed = output(ours, adapter_names=["second", "__base__", "default"])
    with ours.disable_adapter():
        assert_close(mixed[1], output(ours)[1])
    assert_close(mixed[2], output(ours)[2])
    ours.set_adapter("second")
    assert_close(mixed[0], output(ours)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_are_computed_again(folder: Path, reentrant: bool) -> None:
    gradients = []
    for again in (False, True):
        network = bases.LLAMA.build()
        model: Any = splice.PeftModel.from_pretrained(network, folder, is_trainable=True).train()
        if again:
            network.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        output(model).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, computed_again in zip(*gradients):
        assert_close(computed_again, plain)


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (None, "task_ids cannot be None"),
        (torch.tensor([0, 3, 1]), r"`task_ids` must be from 0 to 2 \(`n_tasks`\), got \[0, 3, 1\]"),
        (torch.tensor([0.5, 1.0, 1.0]), "`task_ids` must be integers"),
        (torch.tensor([0, 1]), "as many rows as `task_ids` has, 2"),
    ],
    ids=["none", "another task", "no integers", "too few"],
)
def test_tasks_that_cannot_be_right(tasks: torch.Tensor | None, said: str) -> None:
    model = splice.get_peft_model(bases.LLAMA.build(), config(splice))
    with pytest.raises(ValueError, match=said):
        output(model, tasks)


def test_what_is_refused() -> None:
    for fields, said in (
        ({"r": 0}, "`r`"),
        ({"poly_type": "other"}, "Unsupported poly_type"),
        ({"n_splits": 3}, r"q_proj: `n_splits` \(3\) must divide"),
    ):
        with pytest.raises(ValueError, match=said):
            splice.get_peft_model(bases.LLAMA.build(), config(splice, **fields))
    model: Any = splice.get_peft_model(bases.LLAMA.build(), config(splice))
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_adapter()
