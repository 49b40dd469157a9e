"""`fsdp_auto_wrap_policy`, which transformers' Trainer asks for."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest

from tests.ecosystem.both import reference


def units(classes: str | None) -> list[str]:
    """The modules of a small model with an adapter that become units."""
    from peft import LoraConfig, get_peft_model
    from peft.utils.other import fsdp_auto_wrap_policy
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 24}
    network = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    model = get_peft_model(network, LoraConfig(target_modules=["q_proj", "down_proj"], lora_bias=True))
    with mock.patch.dict(os.environ, {} if classes is None else {"FSDP_TRANSFORMER_CLS_TO_WRAP": classes}):
        policy = fsdp_auto_wrap_policy(model)
    assert policy(module=model, recurse=True, nonwrapped_numel=0)
    return [path for path, module in model.named_modules() if policy(module=module, recurse=False, nonwrapped_numel=0)]


def all_units(_: int = 0) -> list[list[str]]:
    return [units(None), units("LlamaMLP"), units("LlamaAttention,LlamaMLP")]


@pytest.mark.shows("transformers", "the units that Trainer asks for with FSDP (`fsdp_auto_wrap_policy`)")
def test_units_are_those_of_the_reference() -> None:
    found, there = all_units(), reference(all_units)
    assert found == there
    assert len(found[0]) == 10 and "base_model.model.model.layers.0" in found[0]


def test_a_class_that_is_not_there_is_named() -> None:
    with pytest.raises(TypeError, match="class 'Nothing' in the model"):
        units("Nothing")
