"""Steps that programs take by themselves under the reference: done where there is something to do, else refused."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.utils import constants, integrations, other
from torch import nn
from transformers import DynamicCache

import splice
from splice import layer_devices, prefix_forms, steps, utilities
from splice.base.layers import features
from tests import bases

SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
MAPS: list[dict[str, Any]] = [
    {"model.embed": "cpu", "model.layers.0": 0, "model.layers.1": "disk"},
    {"model.layers.0": 0, "model.layers.1": 1},
    {"model.layers.0.attention": 0, "model.layers.0.mlp": 1, "model.layers.1": 1},
    {"": 0},
    {"model.embed": 0, "model": 1},
]


def test_prefixes_in_the_forms_of_old_caches() -> None:
    prefix = tuple(torch.randn(2, 2, 3, 4, 5) for _ in range(3))
    names = ("bloom_model_postprocess_past_key_value", "starcoder_model_postprocess_past_key_value")
    for name in names:
        found, wanted = vars(prefix_forms)[name](prefix), vars(constants)[name](prefix)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("devices", MAPS, ids=str)
def test_where_layers_compute(devices: dict[str, Any]) -> None:
    network: Any = nn.Linear(1, 1)
    network.config, network.hf_device_map = SimpleNamespace(num_hidden_layers=2), devices
    try:
        wanted = integrations.get_layer_device_map(network)
    except RuntimeError:
        with pytest.raises(RuntimeError, match=r"layer 0 has not been mapped.*'model.embed'"):
            layer_devices.get_layer_device_map(network)
    else:
        assert layer_devices.get_layer_device_map(network) == wanted


def test_a_cache_goes_where_layers_compute() -> None:
    network: Any = nn.Linear(1, 1)
    cache = DynamicCache()
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    layer_devices.map_cache_to_layer_device_map(network, cache)
    network.config = SimpleNamespace(num_hidden_layers=1)
    network.hf_device_map = {"layers.0": "meta"}
    layer_devices.map_cache_to_layer_device_map(network, cache)
    assert cache.layers[0].keys.device.type == cache.layers[0].values.device.type == "meta"


@pytest.mark.parametrize("name", ["PrefixTuningConfig", "PromptEncoderConfig", "PromptTuningConfig"])
def test_sizes_that_a_config_of_prompts_leaves_open(name: str) -> None:
    filled = []
    for library, fill in (
        (peft, other._prepare_prompt_learning_config),
        (splice, steps.prepare_prompt_learning_config),
    ):
        config: Any = getattr(library, name)(num_virtual_tokens=3, task_type="CAUSAL_LM")
        assert fill(config, SIZES) is config
        fields = {"num_layers", "token_dim", "num_attention_heads", "encoder_hidden_size"}
        # The reference writes a width into a config that has no such field, too.
        fields &= {field.name for field in dataclasses.fields(config)}
        filled.append({field: vars(config)[field] for field in fields})
        with pytest.raises(ValueError, match="Please specify `num_layers`"):
            fill(getattr(library, name)(num_virtual_tokens=3, task_type="CAUSAL_LM"), {"hidden_size": 3})
    assert filled[1] == filled[0]


def test_what_is_kept_whole_came_with_its_adapter() -> None:
    config = splice.LoraConfig(target_modules=["first"], modules_to_save=["head"])
    model = splice.get_peft_model(bases.LINEAR.build(), config)
    steps.set_additional_trainable_modules(model, config, None, "default")
    steps.set_trainable(model.get_base_model(), "default", ["head"], False)
    with pytest.raises(ValueError, match=r"has no copies of \['second'\].*with which it is added"):
        steps.set_trainable(model, "default", ["second"], False)
    with pytest.raises(ValueError, match="other"):
        steps.set_trainable(model, "other", ["head"], False)


# -- ZeRO-3, whose own library is not installed where these run: who asks it for whole parameters, and who does not.


@pytest.fixture
def zero3(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The parameters that were gathered, by their ids, in the order in which somebody asked for them."""
    asked: list[set[int]] = []

    @contextlib.contextmanager
    def gather(parameters: list[nn.Parameter], modifier_rank: int | None) -> Iterator[None]:
        asked.append(set(map(id, parameters)))
        yield

    settings = ModuleType("transformers.integrations.deepspeed")
    library = ModuleType("deepspeed")
    vars(settings)["is_deepspeed_zero3_enabled"] = lambda: True
    vars(library)["zero"] = SimpleNamespace(GatheredParameters=gather)
    monkeypatch.setitem(sys.modules, settings.__name__, settings)
    monkeypatch.setitem(sys.modules, library.__name__, library)
    return asked


def test_nothing_is_gathered_without_zero3() -> None:
    assert "deepspeed" not in sys.modules
    with utilities.gather_params_ctx(nn.Parameter(torch.ones(1))):
        pass


def test_what_a_new_adapter_starts_from_is_gathered(zero3: list[set[int]]) -> None:
    network = bases.LINEAR.build()
    wanted = [set(map(id, network.get_submodule(path).parameters())) for path in ("first", "head")]
    splice.get_peft_model(network, splice.LoraConfig(target_modules=["first"], modules_to_save=["head"]))
    assert all(parameters in zero3 for parameters in wanted)
    parameter = nn.Parameter(torch.ones(1))
    with utilities.gather_params_ctx([parameter]):
        assert zero3[-1] == {id(parameter)}


def test_the_shape_of_a_divided_layer_is_that_of_the_whole() -> None:
    """Of one that has no sizes but those of its weight: others say theirs themselves."""
    layer: Any = bases.GPT2.build().transformer.h[0].attn.c_attn
    layer.weight.ds_shape = torch.Size((7, 9))
    assert features(layer) == (7, 9)
