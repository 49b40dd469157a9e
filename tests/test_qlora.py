"""Models of transformers that were loaded quantised: prepared, trained, merged, saved and loaded again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splice
from splice.base.weight_access import dense_weight
from tests.bases import generator
from tests.comparing import same_bytes

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

IDS = torch.randint(1, 90, (16, 12), generator=generator())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What the libraries say of their own is not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, in the folder that `from_pretrained` loads."""
    folder = tmp_path_factory.mktemp("dense")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _nf4() -> Any:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def _int8() -> Any:
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


LOADED = {"bnb 4bit": _nf4, "bnb 8bit": _int8, "torchao": _torchao}
loaded = pytest.mark.parametrize("how", LOADED)


def base(folder: Path, how: str = "", dtype: torch.dtype = torch.float32) -> Any:
    settings = {"quantization_config": LOADED[how]()} if how else {}
    return transformers.LlamaForCausalLM.from_pretrained(folder, device_map="cpu", dtype=dtype, **settings).eval()


def qlora(model: Any, **options: Any) -> Any:
    """A fresh adapter on a base that was prepared for it, always with the same values."""
    torch.manual_seed(1)
    model = splice.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = ["q_proj", "v_proj", "down_proj"]
    config = splice.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=targets, **options)
    return splice.get_peft_model(model, config)


def loss_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


@loaded
def test_a_prepared_base_is_trained_and_stays_what_it_is(how: str, dense: Path) -> None:
    """With recomputed blocks: the gradients are those without, and no byte of the base moves."""
    model = qlora(base(dense, how)).train()
    codes = {n: t.clone() for n, t in model.state_dict().items() if "lora" not in n and isinstance(t, torch.Tensor)}
    loss_of(model).backward()
    recomputed = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.get_base_model().gradient_checkpointing_disable()
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(recomputed[name], parameter.grad, rtol=1e-4, atol=1e-6)
    optimizer, first = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2), loss_of(model)
    for _ in range(8):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model) < first - 0.2
    now = model.state_dict()
    assert all(same_bytes(now[name], tensor) for name, tensor in codes.items())


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@loaded
def test_adapters_of_both_precisions_are_trained_on_a_base_in_half(
    how: str, adapters: torch.dtype, dense: Path
) -> None:
    model = base(dense, how, torch.bfloat16)
    config = splice.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    model = splice.get_peft_model(model, config, autocast_adapter_dtype=False).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
    loss_of(model).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {adapters}
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


def _adapted(network: Any) -> Any:
    torch.manual_seed(1)
    config = splice.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return splice.get_peft_model(network, config).eval()


@loaded
def test_a_merged_model_is_saved_and_loaded_by_transformers(how: str, dense: Path, tmp_path: Path) -> None:
    merged = _adapted(base(dense, how)).merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is type(base(dense, how).model.layers[0].self_attn.q_proj)
    merged.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    torch.testing.assert_close(again(IDS).logits, merged(IDS).logits, rtol=1e-3, atol=1e-3)
    assert (again(IDS).logits - base(dense, how)(IDS).logits).abs().max() > 0.1


@loaded
def test_a_model_that_was_dequantised_is_an_ordinary_one(how: str, dense: Path, tmp_path: Path) -> None:
    plain, quantised = base(dense), base(dense, how)
    for path, layer in quantised.named_modules():
        if isinstance(layer, nn.Linear):
            plain.get_submodule(path).weight.data = dense_weight(layer)
    merged, expected = (_adapted(network) for network in (quantised, plain))
    merged, expected = merged.merge_and_unload(dequantize=True), expected.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear  # also what no adapter was on
    torch.testing.assert_close(merged(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert "quantization_config" not in again.config.to_dict()
    torch.testing.assert_close(again(IDS).logits, merged(IDS).logits, rtol=1e-5, atol=1e-5)
