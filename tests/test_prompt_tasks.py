"""Virtual tokens on models of every task, beside the reference: the same checkpoint in both libraries."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from tests.bases import Inputs
from tests.comparing import (
    Pair,
    Snapshot,
    assert_close,
    assert_same_tensors,
    config_in,
    differ,
    load_both,
    named,
    tensors_in,
    trainable_names,
)
from tests.samples import Case, prompt_cases
from tests.task_bases import BART, T5, TASKS, answer, labels_for

CASES = prompt_cases(*TASKS)
# Where the reference can call the model at all.
CALLED = [case for case in CASES if case.base.name not in case.sample.not_on.get("", ())]
every = pytest.mark.parametrize("case", CASES, ids=str)
called = pytest.mark.parametrize("case", CALLED, ids=str)
generating = pytest.mark.parametrize("case", prompt_cases(T5, BART), ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:.*detect padding", "ignore:Token type ids", "ignore:Position ids")


def load(case: Case, shared_checkpoint: Any, *more: str, **options: Any) -> Pair:
    folders = [shared_checkpoint(case.base, case.config())]
    folders += [shared_checkpoint(case.base, case.config(), seed=i + 1) for i, _ in enumerate(more)]
    return load_both(case.base, *folders, **options)


@called
def test_the_output_is_that_of_the_reference(case: Case, shared_checkpoint: Any) -> None:
    pair = load(case, shared_checkpoint)
    masked = case.base.inputs(3)
    bare = {name: value for name, value in masked.items() if name != "attention_mask"}
    embedded = {name: value for name, value in masked.items() if name != "input_ids"}
    embedded["inputs_embeds"] = case.base.build().get_input_embeddings()(masked["input_ids"]).detach()
    typed = {**masked, "token_type_ids": torch.arange(18).view(3, 6) % 2}
    placed = {**masked, "position_ids": torch.arange(6).expand(3, -1) + 2}
    for inputs in (masked, bare, embedded, typed, placed):
        assert_close(answer(pair.ours, inputs), answer(pair.reference, inputs))
    original = answer(case.base.build(), masked)
    assert differ(answer(pair.ours, masked)[:, -original.shape[1] :], original)


@called
def test_the_loss_is_that_of_the_reference(case: Case, shared_checkpoint: Any) -> None:
    labels = labels_for(case.base)
    if not labels:
        return
    pair = load(case, shared_checkpoint)
    inputs = {**case.base.inputs(3), **labels}
    with torch.no_grad():
        ours = pair.ours(**inputs).loss
        if case.base.task == "TOKEN_CLS":  # the reference leaves the labels shorter than what they label
            logits = answer(pair.reference, case.base.inputs(3))[:, -6:]
            expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels["labels"].flatten())
        else:
            expected = pair.reference(**inputs).loss
    assert_close(ours, expected)


@every
def test_saved_again_and_read_by_both(case: Case, shared_checkpoint: Any, tmp_path: Path) -> None:
    """With its head, under the reference's names."""
    folder = shared_checkpoint(case.base, case.config())
    pair = load(case, shared_checkpoint)
    pair.ours.save_pretrained(tmp_path)
    assert_same_tensors(tensors_in(tmp_path), tensors_in(folder))
    assert config_in(tmp_path) == config_in(folder)
    theirs = {name for name, _ in named(pair.reference)}
    assert {name for name, _ in named(pair.ours)} == theirs
    again = peft.PeftModel.from_pretrained(case.base.build(), str(tmp_path))
    assert_same_tensors(peft.get_peft_model_state_dict(again), splice.get_peft_model_state_dict(pair.ours))


@every
def test_a_new_one_is_trained(case: Case, tmp_path: Path) -> None:
    """As in the reference, where that can: the same start, the same gradients, the same losses."""
    losses, models, folder = {}, {}, tmp_path / "splice"
    inputs = {**case.base.inputs(3), **labels_for(case.base)}
    for library in (splice, peft) if case in CALLED and case.base.task != "TOKEN_CLS" else (splice,):
        torch.manual_seed(4)
        model = models[library] = library.get_peft_model(case.base.build(), library.get_peft_config(case.config()))
        heads = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}
        assert any("modules_to_save" in name for name in trainable_names(model)) == (case.base.task in heads)
        losses[library] = train(model, inputs)
        model.save_pretrained(str(tmp_path / library.__name__))
    assert losses[splice][-1] < losses[splice][0]
    if peft in losses:
        assert losses[splice] == pytest.approx(losses[peft], rel=1e-4)
        assert config_in(folder) == config_in(tmp_path / "peft")
    again = splice.PeftModel.from_pretrained(case.base.build(), folder)
    assert torch.equal(answer(again, case.base.inputs(3)), answer(models[splice].eval(), case.base.inputs(3)))


def train(model: Any, inputs: Inputs) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(3):
        output = model(**inputs)
        loss = output.loss if "loss" in output else output.last_hidden_state[:, -1].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every
def test_two_adapters_and_none(case: Case, shared_checkpoint: Any) -> None:
    """Each as if it were alone, off, one deleted, and the base as it was after the last."""
    inputs, network = case.base.inputs(3), case.base.build()
    before, original = Snapshot.of(network), answer(network, inputs)
    folders = [shared_checkpoint(case.base, case.config()), shared_checkpoint(case.base, case.other_config(), seed=1)]
    alone = [answer(splice.PeftModel.from_pretrained(case.base.build(), folder), inputs) for folder in folders]
    model = splice.PeftModel.from_pretrained(network, folders[0])
    model.load_adapter(folders[1], "second")
    assert torch.equal(answer(model, inputs), alone[0])
    model.set_adapter("second")
    assert torch.equal(answer(model, inputs), alone[1])
    assert torch.equal(answer(copy.deepcopy(model), inputs), alone[1])
    with model.disable_adapter():
        assert torch.equal(answer(model, inputs), original)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says which one is active now
        model.delete_adapter("second")
    assert torch.equal(answer(model, inputs), alone[0])
    model.delete_adapter("default")
    before.assert_same(network)
    assert torch.equal(answer(network, inputs), original)


@called
def test_half_precision(case: Case, shared_checkpoint: Any) -> None:
    """The virtual tokens stay in float32; the model computes as it does."""
    pair = load(case, shared_checkpoint, dtype=torch.bfloat16)
    assert pair.ours.prompt_encoder["default"].embedding.weight.dtype == torch.float32
    assert_close(answer(pair.ours, case.base.inputs(3)), answer(pair.reference, case.base.inputs(3)))


@every
def test_rows_with_adapters_of_their_own(case: Case, shared_checkpoint: Any) -> None:
    model = load(case, shared_checkpoint, "second").ours
    inputs = case.base.inputs(3)
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = answer(model, inputs)
    names = ["second", "default", "second"]
    mixed = answer(model, {**inputs, "adapter_names": names})
    assert_close(mixed, torch.stack([expected[name][row] for row, name in enumerate(names)]))
    with pytest.raises(NotImplementedError, match="different numbers of virtual tokens"):
        answer(model, {**inputs, "adapter_names": ["second", "__base__", "second"]})


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@generating
def test_generated_tokens(case: Case, options: dict[str, Any], shared_checkpoint: Any) -> None:
    """With and without the cache the same, and row by row what one adapter alone generates."""
    pair = load(case, shared_checkpoint, "second")
    inputs = {name: value for name, value in case.base.inputs(3).items() if not name.startswith("decoder")}
    options = {**options, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    model = pair.reference if case.sample.reference_generates else pair.ours
    expected = model.generate(**inputs, **options)
    for use_cache in (True, False):
        assert torch.equal(pair.ours.generate(**inputs, **options, use_cache=use_cache), expected)
    pair.ours.set_adapter("second")
    second = pair.ours.generate(**inputs, **options)
    mixed = pair.ours.generate(**inputs, **options, adapter_names=["default", "second", "default"])
    count = options.get("num_return_sequences", 1)
    assert torch.equal(mixed[:count], expected[:count])
    assert torch.equal(mixed[count : 2 * count], second[count : 2 * count])
