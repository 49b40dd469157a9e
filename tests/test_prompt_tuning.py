"""Prompt tuning of causal models, beside the reference: the same checkpoint in both libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import splice

IDS = torch.tensor([[3, 5, 7, 9, 2], [4, 4, 8, 1, 6]])
LEFT_PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(llama(), config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


@pytest.fixture
def both(checkpoint: Path) -> tuple[Any, Any]:
    return (
        peft.PeftModel.from_pretrained(llama(), str(checkpoint)),
        splice.PeftModel.from_pretrained(llama(), checkpoint),
    )


@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["no mask", "left padding"])
@torch.no_grad()
def test_outputs_are_equal(both: tuple[Any, Any], mask: torch.Tensor | None) -> None:
    reference, ours = both
    inputs = {"input_ids": IDS, "attention_mask": mask, "labels": IDS}
    expected, got = reference(**inputs), ours(**inputs)
    assert got.logits.shape[1] == IDS.shape[1] + 3
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.loss, expected.loss)


@pytest.mark.parametrize("mask", [torch.ones_like(IDS), LEFT_PADDED], ids=["no padding", "left padding"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_generated_tokens_are_equal(both: tuple[Any, Any], mask: torch.Tensor, options: dict[str, Any]) -> None:
    """The reference does without its cache: it loses track of it where models take it as `cache` (transformers 5.24)."""
    reference, ours = both
    inputs = {"input_ids": IDS, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}
    assert torch.equal(ours.generate(**inputs), reference.generate(**{**inputs, "use_cache": False}))


@torch.no_grad()
def test_disabled_and_unloaded_is_the_base(both: tuple[Any, Any]) -> None:
    _, ours = both
    expected = llama()(IDS).logits
    with ours.disable_adapter():
        assert torch.equal(ours(input_ids=IDS).logits, expected)
    assert ours(input_ids=IDS).logits.shape != expected.shape
    base = ours.unload()
    assert type(base) is LlamaForCausalLM
    assert torch.equal(base(IDS).logits, expected)


@torch.no_grad()
def test_saved_again_the_reference_loads_it(both: tuple[Any, Any], tmp_path: Path) -> None:
    reference, ours = both
    ours.save_pretrained(tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "again"))
    assert torch.equal(loaded(input_ids=IDS).logits, reference(input_ids=IDS).logits)


def test_a_new_prompt_learns(tmp_path: Path) -> None:
    model = splice.get_peft_model(llama(), splice.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 1
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(10):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert model.peft_config["default"].token_dim == 16


def test_no_virtual_tokens_are_refused() -> None:
    config = splice.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=0)
    with pytest.raises(ValueError, match="`num_virtual_tokens` should be a positive integer, got 0"):
        splice.PeftModel(llama(), config)


def test_a_config_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer_name_or_path"):
        splice.PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="TEXT")
    with pytest.raises(ValueError, match="tokenizer_kwargs"):
        splice.PromptTuningConfig(num_virtual_tokens=3, tokenizer_kwargs={"use_fast": True})


@pytest.mark.parametrize("inference", [False, True], ids=["for training", "for inference"])
def test_what_makes_the_prefix_is_there_for_training_alone(inference: bool) -> None:
    fields = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8}
    names = []
    for library in (peft, splice):
        config = library.PrefixTuningConfig(**fields, inference_mode=inference)
        model = library.get_peft_model(llama(), config)
        names.append({name for name, _ in model.named_parameters() if "prompt_encoder" in name})
    assert names[0] == names[1]
    assert any("transform" in name for name in names[1]) is not inference
