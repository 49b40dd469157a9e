"""What people's scripts and other libraries do with the names of `peft`, on a network of transformers."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.functional import delete_adapter
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LINE = torch.randint(1, 40, (1, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, and the same adapter in a cache of the Hub."""
    place = tmp_path_factory.mktemp("scripts")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)).save_pretrained(place / "base")
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base(place), config).save_pretrained(str(place / "adapter"))
    cached = place / "hub" / "models--someone--adapter"
    shutil.copytree(place / "adapter", cached / "snapshots" / ("a" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    return place


def base(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "base", **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=LINE).logits


@pytest.mark.shows("transformers", "`PeftModel.from_pretrained` on a dispatched base in half precision, `generate`")
def test_inference_from_a_path_and_from_the_hub(folder: Path) -> None:
    dispatched = base(folder, device_map="auto", dtype=torch.float16)
    model = PeftModel.from_pretrained(dispatched, str(folder / "adapter"), is_trainable=False)
    model.eval()
    assert model.generate(input_ids=LINE, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 9)
    straight = logits(PeftModel.from_pretrained(base(folder), str(folder / "adapter")))
    cache = {"cache_dir": str(folder / "hub"), "local_files_only": True}
    assert torch.equal(logits(PeftModel.from_pretrained(base(folder), "someone/adapter", **cache)), straight)
    assert not torch.allclose(straight, logits(base(folder)))


def _each(model: Any, method: str, *args: Any, **options: Any) -> None:
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            getattr(module, method)(*args, **options)


def test_a_network_that_carries_adapters_itself(folder: Path) -> None:
    """What transformers and diffusers do to it, layer by layer."""
    model = base(folder)
    before = logits(model)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    assert peft.inject_adapter_in_model(config, model, "a") is model
    with_a = logits(model)
    names = list(get_peft_model_state_dict(model, adapter_name="a"))
    modules = list(model.modules())
    counts = [sum(isinstance(m, cls) for m in modules) for cls in (BaseTunerLayer, LoraLayer, ModulesToSaveWrapper)]
    assert counts == [2, 2, 1]
    assert [m.active_adapter for m in modules if isinstance(m, BaseTunerLayer)] == [["a"], ["a"]]
    assert "lm_head.weight" in names and not any(name.startswith("base_model") for name in names)
    assert not torch.equal(before, with_a)
    _each(model, "enable_adapters", enabled=False)
    assert torch.equal(logits(model), before)
    _each(model, "enable_adapters", enabled=True)
    assert torch.equal(logits(model), with_a)
    named = {"model.layers.1.self_attn.v_proj.lora_A.weight": torch.zeros(8, 16)}
    other = LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    with pytest.warns(RuntimeWarning, match="In the config alone: model.layers.0.self_attn.v_proj"):
        peft.inject_adapter_in_model(other, model, "b", state_dict=named)
    assert model.model.layers[1].self_attn.v_proj.active_adapter == ["b"]
    _each(model, "set_adapter", "a")
    assert torch.equal(logits(model), with_a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        delete_adapter(model, adapter_name="b", prefix="lora_")
        model.peft_config.pop("b")
        assert torch.equal(logits(model), with_a)
        delete_adapter(model, adapter_name="a", prefix="lora_")
    assert torch.equal(logits(model), before)


def test_a_network_with_a_prompt_is_no_layer_of_a_tuner(folder: Path) -> None:
    """It has a `set_adapter` of its own, which calls that of every layer that it takes for a tuner's."""
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    prompted = get_peft_model(base(folder), config)
    assert [name for name, module in prompted.named_modules() if isinstance(module, BaseTunerLayer)] == []


def test_adapters_of_several_methods(folder: Path) -> None:
    first = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base(folder), first, mixed=True)
    model.add_adapter("loha", peft.LoHaConfig(target_modules=["q_proj", "v_proj"], init_weights=False))
    lora = logits(model)
    model.set_adapter(["default", "loha"])
    both = logits(model)
    assert isinstance(model, peft.PeftMixedModel)
    assert not torch.equal(lora, both)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base(folder)))
    assert torch.allclose(logits(model.merge_and_unload()), both, atol=1e-4)
