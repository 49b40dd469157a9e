"""What programs read and call on a PeftModel, its tuner and its config, in the reference's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from tests import bases


@pytest.fixture(params=["ours", "theirs"])
def library(request: pytest.FixtureRequest) -> Any:
    return splice if request.param == "ours" else peft


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def test_what_a_model_says_of_its_adapters(library: Any) -> None:
    model = library.get_peft_model(network(), library.LoraConfig(target_modules=["0"]))
    assert model.base_model_torch_dtype is None
    assert model.has_active_enabled_adapter is True
    with model.disable_adapter():
        assert model.has_active_enabled_adapter is False
    assert model.special_peft_forward_args == {"adapter_names", "alora_offsets"}
    assert model._is_prompt_learning is False
    assert model._get_base_model_class() is nn.Sequential
    model.set_requires_grad("default", False)
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):
        model.base_model_prepare_inputs_for_generation  # noqa: B018


def test_what_a_model_says_of_its_network(library: Any) -> None:
    base = bases.LLAMA.build(torch.bfloat16)
    config = library.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = library.get_peft_model(base, config)
    assert model.base_model_torch_dtype is torch.bfloat16
    assert model._get_base_model_class().__name__ == "LlamaForCausalLM"
    assert model.base_model_prepare_inputs_for_generation.__name__ == "prepare_inputs_for_generation"
    assert model.base_model.get_model_config(base)["model_type"] == "llama"
    model.prepare_model_for_gradient_checkpointing(base)
    assert base.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_a_model_with_a_prompt(library: Any) -> None:
    config = library.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = library.get_peft_model(bases.LLAMA.build(), config)
    assert model._is_prompt_learning is True
    assert model.has_active_enabled_adapter is True


def test_what_a_tuner_says(library: Any) -> None:
    base = network()
    tuner = library.get_peft_model(base, library.LoraConfig(target_modules=["0"])).base_model
    assert tuner.get_model_config(base) == {"model_type": "custom"}
    assert tuner.target_module_mapping["llama"] == ["q_proj", "v_proj"]
    assert isinstance(base[0], tuner.tuner_layer_cls)
    assert not isinstance(base[2], tuner.tuner_layer_cls)
    assert tuner.uses_shared_state is False
    assert (tuner.targeted_module_names, tuner.targeted_parameter_names) == (["0"], [])
    config = library.LoraConfig(target_modules=["q"])
    assert [bool(tuner._check_target_module_exists(config, key)) for key in ("a.q", "aq")] == [True, False]
    vera = library.get_peft_model(network(), library.VeraConfig(target_modules=["0"], r=2))
    assert vera.base_model.uses_shared_state is True


def test_parameters_that_are_targets(library: Any) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight[0]

    base = nn.Sequential(Experts(), nn.Linear(4, 4))
    config = library.LoraConfig(target_modules=[], target_parameters=["0.weight"])
    assert library.get_peft_model(base, config).base_model.targeted_parameter_names == ["0.weight"]


def test_commands_of_a_tuner(library: Any) -> None:
    base = network()
    tuner = library.get_peft_model(base, library.LoraConfig(target_modules=["0"], init_lora_weights=False)).base_model
    tuner.peft_config["other"] = library.LoraConfig(target_modules=["2"], init_lora_weights=False)
    tuner.inject_adapter(base, "other")
    assert set(base[2].lora_A.keys()) == {"other"}
    tuner.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="cat")
    assert {"default", "both"} <= set(base[0].lora_A.keys())


def test_an_injection_that_fails_leaves_the_config_where_it_was() -> None:
    base = network()
    tuner = splice.get_peft_model(base, splice.LoraConfig(target_modules=["0"])).base_model
    with pytest.raises(ValueError, match="default"):
        tuner.inject_adapter(base, "default")
    config = tuner.peft_config["other"] = splice.LoraConfig(target_modules=["nothing"])
    with pytest.raises(splice.NoMatchingPeftModuleError):
        tuner.inject_adapter(base, "other")
    assert tuner.peft_config["other"] is config
    assert tuner.active_adapters == ["default"]
    with pytest.raises(ValueError, match="another network"):
        tuner.inject_adapter(network(), "other")


def test_configs(library: Any, tmp_path: Path) -> None:
    config = library.LoraConfig
    assert config().is_adaption_prompt is False
    assert type(library.PeftConfig.from_peft_type(peft_type="LORA", r=3)) is config
    assert type(config.from_peft_type(peft_type="IA3")) is library.IA3Config
    with pytest.raises(KeyError):
        config.from_peft_type(peft_type="NOSUCH")
    assert config.check_kwargs(r=4) == {"r": 4}
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"r": 3}))
    assert config.from_json_file(str(file), whatever=1) == {"r": 3}


def test_layers_of_ones_own_are_refused() -> None:
    with pytest.raises(splice.UnsupportedFeatureError, match="Linear.*CONTRIBUTING"):
        splice.LoraConfig()._register_custom_module({nn.Linear: nn.Linear})
