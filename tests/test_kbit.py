"""`prepare_model_for_kbit_training`: what it freezes, casts and switches on, beside the reference."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import splice

# Flags and marks that quantisers leave on a model; what they do to its layers plays no part here.
MARKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "8bit": {"is_loaded_in_8bit": True},
    "4bit": {"is_loaded_in_4bit": True},
    "hqq's own": {"hqq_quantized": True},
    **{method: {"quantization_method": method} for method in ("gptq", "aqlm", "eetq", "hqq", "torchao", "awq", "fp8")},
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_gradient_checkpointing": False},
    {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "auto_clear_cache": False},
]


def base(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).to(dtype)


def marked(mark: str, dtype: torch.dtype) -> LlamaForCausalLM:
    model = base(dtype)
    for name, value in MARKS[mark].items():
        setattr(model, name, value)
    # What quantised layers keep: codes, and small floats that are no half precision.
    model.codes = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    model.small = nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), requires_grad=False)
    model.register_buffer("scales", torch.ones(2, dtype=dtype))
    return model


def described(model: Any) -> dict[str, Any]:
    embedding = model.get_input_embeddings()
    return {
        "tensors": {n: (t.dtype, t.requires_grad) for n, t in (*model.named_parameters(), *model.named_buffers())},
        "checkpointing": model.is_gradient_checkpointing,
        "gradients of inputs": embedding(torch.tensor([1])).requires_grad,
        "how": [f.keywords for m in model.modules() if (f := vars(m).get("_gradient_checkpointing_func"))],
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mark", MARKS)
def test_as_the_reference_does(mark: str, dtype: torch.dtype) -> None:
    for options in OPTIONS:
        ours, theirs = marked(mark, dtype), marked(mark, dtype)
        before = dict(ours.named_parameters())
        assert splice.prepare_model_for_kbit_training(ours, **options) is ours
        peft.prepare_model_for_kbit_training(theirs, **options)
        assert described(ours) == described(theirs)
        assert all(parameter is before[name] for name, parameter in ours.named_parameters())
        for mine, reference in zip(ours.parameters(), theirs.parameters()):
            assert torch.equal(mine.float(), reference.float())


def test_tied_weights_stay_tied() -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    splice.prepare_model_for_kbit_training(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype is torch.float32


@pytest.mark.parametrize("mark", ["plain", "8bit", "torchao"])
def test_an_adapter_trains_on_it(mark: str) -> None:
    """Also with recomputed blocks, whose inputs have to ask for gradients."""
    losses = []
    ids = torch.tensor([[1, 2, 3, 4]])
    for library in (splice, peft):
        model = base()
        for name, value in MARKS[mark].items():
            setattr(model, name, value)
        model = library.prepare_model_for_kbit_training(model)
        for flag in MARKS[mark]:  # the layers are plain ones, and are to be taken for such
            delattr(model, flag)
        model = library.get_peft_model(
            model, library.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
        )
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.manual_seed(len(name))
                parameter.data.copy_(0.1 * torch.randn(parameter.shape))
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    assert losses[:3] == pytest.approx(losses[3:], abs=1e-6)
    assert losses[2] < losses[0]


def test_a_network_that_cannot_recompute_its_blocks_is_refused_before_it_changes() -> None:
    network = nn.Sequential(nn.Linear(2, 2)).half()
    network.is_loaded_in_4bit = True
    with pytest.raises(
        splice.UnsupportedFeatureError, match="Sequential has no method `gradient_checkpointing_enable`"
    ):
        splice.prepare_model_for_kbit_training(network)
    assert all(p.requires_grad and p.dtype is torch.float16 for p in network.parameters())
    assert splice.prepare_model_for_kbit_training(network, use_gradient_checkpointing=False) is network
    assert all(not p.requires_grad and p.dtype is torch.float32 for p in network.parameters())
