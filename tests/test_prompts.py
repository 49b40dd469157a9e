"""Methods that act on the call of the whole model: virtual tokens in front of the input and their like."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from splice.methods.prompts.cached import CachedPrompt
from tests import bases
from tests.bases import Inputs, run
from tests.comparing import (
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

every = pytest.mark.parametrize("case", prompt_cases(bases.LLAMA, bases.GPT2, bases.TIED), ids=str)


def padded(case: Case) -> Inputs:
    """Rows of different lengths, padded on the left as for generation."""
    inputs = case.base.inputs(3)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :2] = mask[2, :4] = 0
    return {**inputs, "attention_mask": mask}


def always(case: Case, rows: int) -> Inputs:
    """What every call needs beside its input."""
    return {name: value for name, value in case.base.inputs(rows).items() if name in case.sample.call}


@every
def test_the_output_is_that_of_the_reference(case: Case, shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    output = pair.assert_equal()
    bare = run(case.base.build(), case.base.inputs(3))
    assert differ(output[:, -bare.shape[1] :], bare)
    for inputs in (padded(case), {**always(case, 2), "input_ids": case.base.inputs(2)["input_ids"]}):
        assert_close(run(pair.ours, inputs), run(pair.reference, inputs), factor=3)


@every
def test_labels(case: Case, shared_checkpoint: Any) -> None:
    """The virtual tokens have none, and the loss is the reference's."""
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    inputs = padded(case)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        losses = [model(**inputs).loss for model in (pair.reference, pair.ours)]
    assert_close(losses[1], losses[0])


@every
def test_embedded_input(case: Case, shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    embedded = case.base.build().get_input_embeddings()(case.base.inputs(3)["input_ids"]).detach()
    ours, reference = (
        run(model, {**always(case, 3), "inputs_embeds": embedded}) for model in (pair.ours, pair.reference)
    )
    assert_close(ours, reference)


OPTIONS = ({}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@every
def test_generated_tokens(case: Case, options: dict[str, Any], shared_checkpoint: Any) -> None:
    """With and without the cache the same tokens.

    They are compared with what the reference generates without: with the cache it computes other positions.
    """
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    for inputs in (case.base.inputs(3), padded(case)):
        model = pair.reference if case.sample.reference_generates else pair.ours
        expected = _generated(model, inputs, use_cache=False, **options)
        assert torch.equal(_generated(pair.ours, inputs, use_cache=False, **options), expected)
        assert torch.equal(_generated(pair.ours, inputs, use_cache=True, **options), expected)


def _generated(model: Any, inputs: Inputs, **options: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)


@every
def test_generated_tokens_are_those_of_one_forward_after_the_other(case: Case, shared_checkpoint: Any) -> None:
    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    # A forward alone counts positions in a cache without regard to padding, as the reference does; `generate` does not.
    inputs = case.base.inputs(3) if issubclass(case.method.network_layer, CachedPrompt) else padded(case)
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    for _ in range(5):
        chosen = run(model, {**always(case, 3), "input_ids": ids, "attention_mask": mask})[:, -1].argmax(
            -1, keepdim=True
        )
        ids, mask = torch.cat([ids, chosen], 1), torch.cat([mask, torch.ones_like(chosen)], 1)
    assert torch.equal(_generated(model, inputs), ids)


@every
def test_two_adapters_and_none(case: Case, shared_checkpoint: Any) -> None:
    first, second = (
        shared_checkpoint(case.base, case.config()),
        shared_checkpoint(case.base, case.other_config(), seed=1),
    )
    pair = load_both(case.base, first, second)
    before = pair.assert_equal()
    pair.each(lambda model: model.set_adapter("second"))
    assert differ(pair.assert_equal(), before)
    pair.each(lambda model: model.set_adapter("default"))
    assert torch.equal(pair.assert_equal(), before)
    inputs = case.base.inputs(3)
    with pair.ours.disable_adapter():
        assert torch.equal(run(pair.ours, inputs), run(case.base.build(), inputs))
        assert torch.equal(bases.generate(pair.ours, case.base), bases.generate(case.base.build(), case.base))
    assert torch.equal(pair.assert_equal(), before)


@every
def test_saved_again(case: Case, shared_checkpoint: Any, tmp_path: Path) -> None:
    folder = shared_checkpoint(case.base, case.config())
    model = splice.PeftModel.from_pretrained(case.base.build(), folder, adapter_name="mine")
    model.save_pretrained(tmp_path)
    assert_same_tensors(tensors_in(tmp_path / "mine"), tensors_in(folder))
    assert config_in(tmp_path / "mine") == config_in(folder)
    reference = peft.PeftModel.from_pretrained(case.base.build(), str(tmp_path / "mine"))
    assert_close(run(reference, case.base.inputs(3)), run(model, case.base.inputs(3)))


@every
def test_a_new_one_is_trained_as_in_the_reference(case: Case, tmp_path: Path) -> None:
    losses = []
    for library in (peft, splice):
        torch.manual_seed(4)
        model = library.get_peft_model(case.base.build(), library.get_peft_config(case.config()))
        assert all("prompt_encoder" in name for name in trainable_names(model))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
        inputs = case.base.inputs(3)
        for _ in range(4):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.save_pretrained(str(tmp_path / library.__name__))
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-4)
    assert losses[-1] < losses[4]
    assert config_in(tmp_path / "splice") == config_in(tmp_path / "peft")
    again = splice.PeftModel.from_pretrained(case.base.build(), tmp_path / "splice")
    assert torch.equal(run(again, case.base.inputs(3)), run(model.eval(), case.base.inputs(3)))


@every
def test_names_and_counts(case: Case, shared_checkpoint: Any) -> None:
    folder = shared_checkpoint(case.base, case.config())
    pair = load_both(case.base, folder, shared_checkpoint(case.base, case.other_config(), seed=1))
    theirs = {name for name, _ in named(pair.reference)}
    assert {name for name, _ in named(pair.ours)} == theirs
    assert_same_tensors(splice.get_peft_model_state_dict(pair.ours), peft.get_peft_model_state_dict(pair.reference))
    assert pair.ours.active_adapters == pair.reference.active_adapters
    assert pair.ours.get_nb_trainable_parameters()[1] == pair.reference.get_nb_trainable_parameters()[1]


@every
def test_taken_off(case: Case, shared_checkpoint: Any) -> None:
    network = case.base.build()
    before, output = Snapshot.of(network), run(network, case.base.inputs(3))
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(case.base, case.config()))
    model.load_adapter(shared_checkpoint(case.base, case.other_config(), seed=1), "second")
    adapted = run(model, case.base.inputs(3))
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(clone, case.base.inputs(3)), adapted)
        assert torch.equal(*(bases.generate(m, case.base, **always(case, 3)) for m in (clone, model)))
    model.delete_adapter("second")
    assert torch.equal(run(model, case.base.inputs(3)), adapted)
    model.delete_adapter("default")
    before.assert_same(network)
    assert torch.equal(run(network, case.base.inputs(3)), output)


@every
def test_rows_are_right_or_refused(case: Case, shared_checkpoint: Any) -> None:
    """Rows of different lengths may not fit into one batch; what is never right is to use one adapter for all."""
    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    model.load_adapter(shared_checkpoint(case.base, case.config(), seed=1), "second")
    inputs = case.base.inputs(2)
    expected = []
    for name in ("second", "default"):
        model.set_adapter(name)
        expected.append(run(model, inputs)[len(expected)])
    refused = ""
    try:
        mixed = run(model, inputs, adapter_names=["second", "default"])
    except (TypeError, ValueError, NotImplementedError) as error:
        refused = str(error)
    if refused:
        assert "adapter_names" in refused
    else:
        assert_close(mixed, torch.stack(expected))


@pytest.mark.parametrize("case", prompt_cases(bases.LLAMA), ids=str)
def test_positions_in_the_cache_are_not_the_callers(case: Case, shared_checkpoint: Any) -> None:
    """`generate` of transformers 4 sends `cache_position`, counted without the virtual tokens."""
    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    seen: list[dict[str, Any]] = []
    model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    inputs = case.base.inputs(2)
    positions = torch.arange(inputs["input_ids"].shape[1])
    assert torch.equal(run(model, {**inputs, "cache_position": positions}), run(model, inputs))
    assert all(kwargs.get("cache_position") is not positions for kwargs in seen)
