"""Adapters on bare parameters of a module, such as stacked experts: named by `target_parameters`."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from tests import bases
from tests.bases import run
from tests.comparing import (
    Snapshot,
    assert_close,
    assert_same_tensors,
    base_parameters,
    config_in,
    differ,
    load_both,
    named,
    parameters_of,
    state_of,
    tensors_in,
    trainable_names,
)
from tests.samples import Case, parameter_cases

CASES = parameter_cases(bases.EXPERTS)
CHOICES = (["up"], ["down", "up"], ["gate"], ["up", "down", "gate"], ["blocks.1.up", "gate"])
every = pytest.mark.parametrize("names", CHOICES, ids=str)
methods = pytest.mark.parametrize("case", CASES, ids=str)


def config(case: Case, names: list[str], **changes: Any) -> dict[str, Any]:
    return case.config(target_modules=[], target_parameters=names, **changes)


def loaded(
    case: Case, names: list[str], shared_checkpoint: Any, network: nn.Module | None = None, **changes: Any
) -> Any:
    folder = shared_checkpoint(case.base, config(case, names, **changes))
    return splice.PeftModel.from_pretrained(network or case.base.build(), folder)


@every
@methods
def test_the_output_is_that_of_the_reference(case: Case, names: list[str], shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, config(case, names)), is_trainable=True)
    output = pair.assert_equal()
    assert differ(output, run(case.base.build(), case.base.inputs(3)))
    assert parameters_of(pair.ours) == parameters_of(pair.reference)
    assert set(state_of(pair.ours)) == set(state_of(pair.reference))


@every
@methods
def test_gradients(case: Case, names: list[str], shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, config(case, names)), is_trainable=True)
    found = []
    for model in (pair.reference, pair.ours):
        model(**case.base.inputs(3)).square().sum().backward()
        found.append({name: p.grad for name, p in named(model) if p.grad is not None})
    assert set(found[1]) == set(found[0]) == trainable_names(pair.ours)
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, factor=10)


@every
@methods
def test_saved_again(case: Case, names: list[str], shared_checkpoint: Any, tmp_path: Path) -> None:
    folder = shared_checkpoint(case.base, config(case, names))
    model = splice.PeftModel.from_pretrained(case.base.build(), folder)
    model.save_pretrained(tmp_path)
    assert_same_tensors(tensors_in(tmp_path), tensors_in(folder))
    assert config_in(tmp_path) == config_in(folder)
    reference = peft.PeftModel.from_pretrained(case.base.build(), str(tmp_path))
    assert_close(run(reference, case.base.inputs(3)), run(model, case.base.inputs(3)))


@every
@methods
def test_merged(case: Case, names: list[str], shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, config(case, names)))
    before = pair.assert_equal()
    pair.ours.merge_adapter()
    assert_close(run(pair.ours, case.base.inputs(3)), before)
    pair.ours.unmerge_adapter()
    assert torch.equal(run(pair.ours, case.base.inputs(3)), before)
    merged = [model.merge_and_unload() for model in (pair.reference, pair.ours)]
    assert_close(run(merged[1], case.base.inputs(3)), before)
    for name, tensor in merged[0].state_dict().items():
        assert_close(merged[1].state_dict()[name], tensor)


@every
@methods
def test_taken_off(case: Case, names: list[str], shared_checkpoint: Any) -> None:
    """Also copied and pickled; and while it is there, a parameter that is read outside of a call is the base's own."""
    network = case.base.build()
    before, output = Snapshot.of(network), run(network, case.base.inputs(3))
    model = loaded(case, names, shared_checkpoint, network)
    adapted = run(model, case.base.inputs(3))
    assert all(id(base_parameters(network)[name]) == identity for name, (identity, *_) in before.parameters.items())
    with model.disable_adapter():
        assert torch.equal(run(model, case.base.inputs(3)), output)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(clone, case.base.inputs(3)), adapted)
        before.assert_same(clone.unload(), same_objects=False)
    model.unload()
    before.assert_same(network)


@every
@methods
def test_two_adapters(case: Case, names: list[str], shared_checkpoint: Any) -> None:
    first, second = (shared_checkpoint(case.base, config(case, names), seed=seed) for seed in (0, 1))
    pair = load_both(case.base, first, second)
    before = pair.assert_equal()
    pair.each(lambda model: model.set_adapter("second"))
    assert differ(pair.assert_equal(), before)
    pair.each(lambda model: model.base_model.set_adapter(["default", "second"]))
    pair.assert_equal()
    pair.each(lambda model: model.set_adapter("default"))
    assert torch.equal(pair.assert_equal(), before)


@every
@methods
def test_rows(case: Case, names: list[str], shared_checkpoint: Any) -> None:
    """The reference refuses them; here each row gets what it gets alone."""
    model = loaded(case, names, shared_checkpoint)
    model.load_adapter(shared_checkpoint(case.base, config(case, names), seed=1), "second")
    inputs = case.base.inputs(3)
    rows = ["second", "__base__", "default"]
    mixed = run(model, inputs, adapter_names=rows)
    for row, name in enumerate(rows):
        if name == "__base__":
            expected = run(case.base.build(), inputs)
        else:
            model.set_adapter(name)
            expected = run(model, inputs)
        assert_close(mixed[row], expected[row])


@methods
def test_an_exception_inside_leaves_the_parameters(case: Case, shared_checkpoint: Any) -> None:
    network = case.base.build()
    model = loaded(case, ["up", "down"], shared_checkpoint, network)
    before = {name: id(parameter) for name, parameter in base_parameters(network).items()}
    output = run(model, case.base.inputs(3))
    with pytest.raises(RuntimeError):
        run(model, {"x": torch.randn(2, 5, 7)})
    assert {name: id(parameter) for name, parameter in base_parameters(network).items()} == before
    assert not {"up", "down"} & set(vars(network.blocks[0]))
    assert torch.equal(run(model, case.base.inputs(3)), output)


@methods
def test_together_with_targets_that_are_layers(case: Case, shared_checkpoint: Any) -> None:
    fields = case.config(target_modules=["head"], target_parameters=["up"])
    pair = load_both(case.base, shared_checkpoint(case.base, fields))
    pair.assert_equal()
    assert parameters_of(pair.ours) == parameters_of(pair.reference)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_parameters": ["nothing"]}, "nothing"),
        ({"target_parameters": ["head.bias"]}, "1 dimension; "),
        ({"target_parameters": ["head.weight"], "target_modules": ["head"]}, "head"),
        ({"target_parameters": ["up"], "lora_dropout": 0.1}, "lora_dropout"),
    ],
    ids=str,
)
@methods
def test_refusals(case: Case, fields: dict[str, Any], message: str, library: Any) -> None:
    if not set(fields) <= set(vars(library.get_peft_config(case.config(target_modules=[])))):
        pytest.skip("the method has no such field")
    network = case.base.build()
    config = library.get_peft_config(case.config(**{"target_modules": [], **fields}))
    with pytest.raises(ValueError, match=message if library is splice else ""):
        library.get_peft_model(network, config)


@methods
def test_a_string_is_no_list(case: Case, library: Any) -> None:
    with pytest.raises(TypeError, match="target_parameters"):
        library.get_peft_config(config(case, "up"))  # type: ignore[arg-type]


def test_a_layer_and_its_parameter_are_not_both_targets() -> None:
    network = bases.EXPERTS.build()
    config = splice.LoraConfig(target_modules=["head"], target_parameters=["head.weight"])
    with pytest.raises(ValueError, match="'head' is selected by target_modules and one of its parameters by"):
        splice.get_peft_model(network, config)
    assert type(network.head) is torch.nn.Linear
