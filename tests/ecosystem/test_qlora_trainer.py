"""QLoRA with transformers' Trainer: 4 bits, recomputed blocks, a head that is trained whole, and a run that is broken off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

pytest.importorskip("bitsandbytes")
shows = pytest.mark.shows
IDS = torch.randint(1, 90, (16, 12), generator=torch.Generator().manual_seed(1))


def base(folder: Path) -> Any:
    """A tiny Llama in 4 bits, with the weights in `folder`."""
    if not folder.exists():
        torch.manual_seed(0)
        sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2)
        LlamaForCausalLM(config).save_pretrained(folder)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map="cpu", dtype=torch.float32
    ).eval()


def qlora(folder: Path) -> Any:
    model = peft.prepare_model_for_kbit_training(base(folder), gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=targets, modules_to_save=["lm_head"]
    )
    return peft.get_peft_model(model, config)


def loss_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, labels=IDS).loss


def train(model: Any, folder: Path, resume: bool = False, steps: int = 20) -> Any:
    options = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=10,
        logging_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model=model, args=options, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@shows(
    "bitsandbytes", "QLoRA by transformers' Trainer: 4 bits, recomputed blocks, a trained head, resumed as if unbroken"
)
def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    before = loss_of(qlora(dense))
    whole = train(qlora(dense), tmp_path / "whole").model
    train(qlora(dense), tmp_path / "parts", steps=10)
    rest = train(qlora(dense), tmp_path / "parts", resume=True).model
    expected, found = (peft.get_peft_model_state_dict(model) for model in (whole, rest))
    assert expected.keys() == found.keys()
    assert any("lm_head" in name for name in found)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert loss_of(whole) < before - 0.3
    again = peft.PeftModel.from_pretrained(base(dense), tmp_path / "parts" / "checkpoint-20")
    torch.testing.assert_close(loss_of(again), loss_of(rest), rtol=1e-3, atol=1e-3)
