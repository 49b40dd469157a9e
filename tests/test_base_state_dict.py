"""The base model's own state dict, of a model that carries adapters."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import splice
from tests import bases
from tests.bases import run

CONFIGS: dict[str, dict[str, Any]] = {
    "layers": {"target_modules": ["q_proj", "embed_tokens"]},
    "copies": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "biases": {"target_modules": ["c_attn", "c_fc"], "bias": "all"},
    "target biases": {"target_modules": ["c_attn"], "bias": "lora_only"},
}


def base_of(name: str) -> bases.Base:
    return bases.GPT2 if "bias" in name else bases.LLAMA


def adapted(library: Any, name: str) -> Any:
    config = library.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **CONFIGS[name])
    torch.manual_seed(3)
    return library.get_peft_model(base_of(name).build(), config)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_that_of_the_base_alone(name: str) -> None:
    own, model = base_of(name).build().state_dict(), adapted(splice, name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0) if parameter.requires_grad else None
    found = splice.get_base_model_state_dict(model)
    assert list(found) == list(own)
    assert all(torch.equal(found[key], tensor) for key, tensor in own.items())
    assert list(peft.get_base_model_state_dict(adapted(peft, name))) == list(found)
    assert found.keys() == splice.get_base_model_state_dict(model.get_base_model()).keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_it_can_be_set(name: str) -> None:
    model, own = adapted(splice, name), base_of(name).build().state_dict()
    adapter = {key: tensor.clone() for key, tensor in splice.get_peft_model_state_dict(model).items()}
    other = {key: 0.5 * tensor for key, tensor in own.items()}
    result = splice.set_base_model_state_dict(model, other)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    now = splice.get_base_model_state_dict(model)
    assert all(torch.equal(now[key], tensor) for key, tensor in other.items())
    after = splice.get_peft_model_state_dict(model)
    base_copies = {key for key in adapter if "embed_tokens.base_layer" in key}
    assert all(torch.equal(after[key], tensor) for key, tensor in adapter.items() if key not in base_copies)
    network = base_of(name).build()
    network.load_state_dict(other)
    inputs = base_of(name).inputs(2)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), run(network, inputs))


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    model, own = adapted(splice, "copies"), bases.LLAMA.build().state_dict()
    other = {key: 0.5 * tensor for key, tensor in own.items()}
    del other["lm_head.weight"]
    other["foo"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key\(s\).*lm_head.*Unexpected key\(s\).*foo"):
        splice.set_base_model_state_dict(model, other)
    with pytest.raises(RuntimeError, match=r"size mismatch for lm_head.weight: \(3,\)"):
        splice.set_base_model_state_dict(model, {**other, "lm_head.weight": torch.zeros(3)}, strict=False)
    now = splice.get_base_model_state_dict(model)
    assert all(torch.equal(now[key], tensor) for key, tensor in own.items())
    result = splice.set_base_model_state_dict(model, other, strict=False)
    expected = peft.set_base_model_state_dict(adapted(peft, "copies"), other, strict=False)
    assert tuple(result) == tuple(expected) == (["lm_head.weight"], ["foo"])
    assert torch.equal(splice.get_base_model_state_dict(model)["lm_head.weight"], own["lm_head.weight"])


def test_while_merged_it_is_what_it_was() -> None:
    model, own = adapted(splice, "layers"), bases.LLAMA.build().state_dict()
    model.merge_adapter()
    assert not torch.equal(model.get_base_model().model.embed_tokens.weight, own["model.embed_tokens.weight"])
    found = splice.get_base_model_state_dict(model)
    assert all(torch.equal(found[key], tensor) for key, tensor in own.items())
    with pytest.raises(ValueError, match=r"\['default'\] are merged"):
        splice.set_base_model_state_dict(model, own)


def test_of_a_prompt_it_is_the_networks() -> None:
    config = splice.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = splice.get_peft_model(bases.LLAMA.build(), config)
    assert list(splice.get_base_model_state_dict(model)) == list(bases.LLAMA.build().state_dict())
