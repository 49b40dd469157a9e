"""Adapters that were left without values (`low_cpu_mem_usage=True`) and are filled later, as other libraries load them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import splice
from splice.loading import load
from tests import bases
from tests.bases import run
from tests.comparing import differ
from tests.samples import Case, as_stored, kind_cases, network_cases, plain_cases

every = pytest.mark.parametrize(
    "case", [*kind_cases(), *plain_cases(bases.TIED), *as_stored(network_cases(bases.LLAMA))], ids=str
)


def _state_dict(model: Any, folder: Any) -> None:
    result = splice.set_peft_model_state_dict(model, splice.load_peft_weights(folder))
    assert not result.unexpected_keys


def _load_adapter(model: Any, folder: Any) -> None:
    model.load_adapter(folder, "default")


@pytest.mark.parametrize("fill", [_state_dict, _load_adapter], ids=["set_peft_model_state_dict", "load_adapter"])
@every
def test_an_empty_adapter_is_filled(case: Case, fill: Callable[[Any, Any], None], shared_checkpoint: Any) -> None:
    folder = shared_checkpoint(case.base, case.config())
    expected = run(splice.PeftModel.from_pretrained(case.base.build(), folder), case.base.inputs(2))
    config = splice.PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    model = splice.get_peft_model(case.base.build(), config, low_cpu_mem_usage=True).eval()
    assert any(parameter.is_meta for parameter in model.parameters())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    fill(model, folder)
    assert torch.equal(run(model, case.base.inputs(2)), expected)
    assert not any(buffer.requires_grad for buffer in model.buffers())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize("case", plain_cases(bases.LINEAR), ids=str)
def test_an_injected_empty_adapter_is_filled(case: Case, shared_checkpoint: Any) -> None:
    if case.method.shared is not None:
        pytest.skip("cannot be injected")
    folder = shared_checkpoint(case.base, case.config())
    expected = run(splice.PeftModel.from_pretrained(case.base.build(), folder), case.base.inputs(2))
    network = case.base.build()
    config = splice.PeftConfig.from_pretrained(folder)
    splice.inject_adapter_in_model(config, network, low_cpu_mem_usage=True)
    tensors = splice.load_peft_weights(folder)
    splice.set_peft_model_state_dict(network, {n.removeprefix("base_model.model."): t for n, t in tensors.items()})
    assert torch.equal(run(network, case.base.inputs(2)), expected)


def test_a_fill_that_fails_leaves_the_adapter_empty(shared_checkpoint: Any) -> None:
    case = plain_cases(bases.LINEAR)[0]
    folder = shared_checkpoint(case.base, case.config())
    model = splice.get_peft_model(case.base.build(), splice.PeftConfig.from_pretrained(folder), low_cpu_mem_usage=True)
    before = dict(model.named_parameters())
    tensors = splice.load_peft_weights(folder)
    tensors["base_model.model.nowhere.lora_A.weight"] = torch.ones(1, 1)
    with pytest.raises(splice.AdapterMismatchError):
        model.load_adapter(None, "default", tensors=tensors)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not differ(run(case.base.build(), case.base.inputs(2)), run(case.base.build(), case.base.inputs(2)))


def test_a_fill_that_fails_at_the_last_moment_leaves_the_adapter_empty(
    shared_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it has been given memory by then: the tensors without values are back, as the same objects."""
    case = plain_cases(bases.LINEAR)[0]
    folder = shared_checkpoint(case.base, case.config())
    model = splice.get_peft_model(case.base.build(), splice.PeftConfig.from_pretrained(folder), low_cpu_mem_usage=True)
    before = dict(model.named_parameters())
    assert any(parameter.is_meta for parameter in before.values())

    def fail(*given: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(load, "read_for", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            model.load_adapter(folder, "default")
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {
        n: id(p) for n, p in before.items()
    }
    model.load_adapter(folder, "default")
    expected = run(splice.PeftModel.from_pretrained(case.base.build(), folder), case.base.inputs(2))
    assert torch.equal(run(model, case.base.inputs(2)), expected)
