"""What people write, as they write it: the README's three usages, on a real model of transformers from a folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from splice import LoraConfig, PeftModel, get_peft_model
from tests import bases
from tests.bases import run
from tests.comparing import assert_close, differ

INPUTS = bases.LLAMA.inputs(3)
CONFIG = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    bases.LLAMA.build().save_pretrained(folder)
    return folder


def test_inference_on_a_dispatched_half_precision_base(base_folder: Path, checkpoint: Any) -> None:
    from transformers import AutoModelForCausalLM

    adapter = checkpoint(bases.LLAMA, CONFIG)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float16, device_map="auto")
    model = PeftModel.from_pretrained(base, adapter, is_trainable=False)
    model.eval()
    tokens = model.generate(**INPUTS, max_new_tokens=4, do_sample=False)

    other = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float16, device_map="auto")
    reference: Any = peft.PeftModel.from_pretrained(other, str(adapter), is_trainable=False).eval()
    assert model.dtype == torch.float16
    assert_close(run(model, INPUTS), run(reference, INPUTS))
    assert torch.equal(tokens, reference.generate(**INPUTS, max_new_tokens=4, do_sample=False))
    assert str(model.load_report).startswith("default: 8 of 8 tensors on 4 layers")


def test_several_named_adapters(base_folder: Path, checkpoint: Any) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder)
    plain = run(base, INPUTS)
    model = PeftModel.from_pretrained(base, checkpoint(bases.LLAMA, CONFIG), adapter_name="math_adapter")
    first = run(model, INPUTS)
    model.load_adapter(checkpoint(bases.LLAMA, CONFIG, name="poetry", seed=1), adapter_name="poetry_adapter")
    assert torch.equal(run(model, INPUTS), first)
    model.set_adapter("poetry_adapter")
    assert differ(run(model, INPUTS), first)
    with model.disable_adapter():
        assert torch.equal(run(model, INPUTS), plain)
    model.set_adapter("math_adapter")
    assert torch.equal(run(model, INPUTS), first)


def test_training_on(base_folder: Path, checkpoint: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = PeftModel.from_pretrained(base, checkpoint(bases.LLAMA, CONFIG), is_trainable=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(**INPUTS, labels=INPUTS["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "trained")
    assert torch.equal(run(again, INPUTS), run(model.eval(), INPUTS))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_that_was_on_before(reentrant: bool) -> None:
    """Recomputed blocks pass gradients on only if their input requires them: the embeddings are told to."""
    base = bases.LLAMA.build()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with suppress(AttributeError):  # transformers before 5 has done nothing of its own accord that could be taken back
        base.disable_input_require_grads()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).train()
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())
    assert not model.unload().get_input_embeddings()._forward_hooks


def test_a_base_that_would_multiply_with_slices_of_its_weights() -> None:
    """Older models of transformers do so with `pretraining_tp`, and step around whatever is on the layer."""
    base = bases.LLAMA.build()
    base.config.pretraining_tp = 4
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    assert base.config.pretraining_tp == 1
    model.unload()
    assert base.config.pretraining_tp == 4
