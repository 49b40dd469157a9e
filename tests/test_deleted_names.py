"""The name of a deleted adapter is free again, and a failed load leaves a model to the facade that it has."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch

import splice
from splice import functional
from splice.surgery.tuner import Tuner
from tests import bases
from tests.bases import run
from tests.comparing import trainable_names
from tests.samples import Case, as_stored, kind_cases, network_cases, plain_cases

each = pytest.mark.parametrize("case", [*plain_cases(bases.LINEAR), *as_stored(network_cases(bases.LLAMA))], ids=str)


@each
def test_a_name_that_is_deleted_and_added_again_is_trained_when_selected(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = splice.get_peft_model(case.base.build(), splice.get_peft_config(case.config()), "a")
        names = trainable_names(model)
        for frozen in (True,) if case.sample.one_trained else (False, True):
            model.add_adapter("b", splice.get_peft_config(case.config(inference_mode=frozen)))
            model.set_adapter("b")
            assert len(trainable_names(model)) == len(names)
            model.delete_adapter("a")
            model.add_adapter("a", splice.get_peft_config(case.config()))
            model.set_adapter("a")
            assert trainable_names(model) == names
            model.delete_adapter("b")


@pytest.mark.parametrize("last", [False, True], ids=["beside another", "alone"])
@pytest.mark.parametrize("case", kind_cases(), ids=str)
def test_a_name_that_transformers_deleted(case: Case, last: bool, library: Any) -> None:
    """`delete_adapter` of transformers calls this one, and takes the config out afterwards, or does not get so far."""
    if case.method.shared is not None:
        pytest.skip("it cannot be injected")
    network = case.base.build()
    functions = __import__(f"{library.__name__}.functional", fromlist=["delete_adapter"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library is peft and case.base.name in case.sample.reference_not_on:
            pytest.skip("the reference cannot put it on such layers")
        for name in ["a"] if last else ["b", "a"]:
            frozen = name == "b" and case.sample.one_trained
            config = library.get_peft_config(case.config(inference_mode=frozen))
            library.inject_adapter_in_model(config, network, name)
        functions.delete_adapter(network, "a", prefix=case.method.prefix)
        assert "a" in network.peft_config
        library.inject_adapter_in_model(library.get_peft_config(case.config()), network, "a")
        functions.set_adapter(network, "a")
    assert list(network.peft_config) == (["a"] if last else ["b", "a"])
    assert any(".a." in name or name.endswith(".a") for name, p in network.named_parameters() if p.requires_grad)
    functions.delete_adapter(network, "a", prefix=case.method.prefix)
    network.peft_config.pop("a")
    assert "a" not in network.peft_config


def test_a_name_that_is_not_there(shared_checkpoint: Any) -> None:
    case = plain_cases(bases.LINEAR)[0]
    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    with pytest.raises(ValueError, match="nobody (not found|does not exist)"):
        functional.delete_adapter(model, "nobody")
    model.load_adapter(shared_checkpoint(case.base, case.config(), seed=1), "a")
    functional.delete_adapter(model, "a")
    model.load_adapter(shared_checkpoint(case.base, case.config(), seed=1), "a")
    model.set_adapter("a")
    assert list(model.peft_config) == ["default", "a"]


@pytest.mark.parametrize("how", ["load", "new"])
def test_a_failed_load_leaves_a_mixed_model_mixed(how: str, tmp_path: Any) -> None:
    one, other = [case for case in plain_cases(bases.LINEAR) if not case.sample.one_trained][:2]
    assert one.method is not other.method
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = splice.get_peft_model(bases.LINEAR.build(), splice.get_peft_config(one.config()), mixed=True)
        tuner: Tuner = model.base_model
        before = run(model, bases.LINEAR.inputs(3))
        unfit = splice.get_peft_config(one.config(target_modules=["nothing"]))
        splice.get_peft_model(bases.LINEAR.build(), splice.get_peft_config(one.config())).save_pretrained(tmp_path)
        unfit.save_pretrained(tmp_path)
        with pytest.raises(Exception, match="nothing"):
            if how == "load":
                splice.PeftModel.from_pretrained(tuner.model, tmp_path, adapter_name="new")
            else:
                splice.PeftModel(tuner.model, unfit, "new")
        assert tuner.mixes_methods
        model.add_adapter("other", splice.get_peft_config(other.config()))
    assert list(model.peft_config) == ["default", "other"]
    assert torch.equal(run(model.eval(), bases.LINEAR.inputs(3)), before)


@pytest.mark.parametrize("case", as_stored(network_cases(bases.LLAMA)), ids=str)
def test_a_failed_load_leaves_the_call_with_its_facade(case: Case, shared_checkpoint: Any, tmp_path: Any) -> None:
    folder = shared_checkpoint(case.base, case.config())
    model = splice.PeftModel.from_pretrained(case.base.build(), folder)
    names, expected = [name for name, _ in model.named_parameters()], run(model, case.base.inputs(3))
    with pytest.raises(ValueError, match="exists"):
        splice.PeftModel.from_pretrained(model.base_model.model, folder)
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(run(model, case.base.inputs(3)), expected)
    model.delete_adapter("default")
    assert not [name for name, _ in model.named_parameters() if "prompt" in name]
