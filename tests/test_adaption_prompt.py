"""Adaption prompts beside the reference: tokens that attention layers look at, on each form of attention that it knows."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from splice.errors import UnsupportedLayerError
from tests import bases
from tests.bases import VOCABULARY, Base, Inputs, run
from tests.comparing import Snapshot, assert_close, assert_same_tensors, config_in, differ, load_both, named, tensors_in
from tests.samples import SAMPLES

SAMPLE = SAMPLES[splice.PeftType.ADAPTION_PROMPT]


def _mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=None,
            initializer_range=0.2,
        )
    )  # fmt: skip


def _with_biases() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=None, attention_bias=True,
        )
    )  # fmt: skip
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.bias, std=0.3)
    return model


MISTRAL = Base("mistral", _mistral, bases.LLAMA.inputs, task="CAUSAL_LM", generates=True)
BIASES = Base("llama_biases", _with_biases, bases.LLAMA.inputs, task="CAUSAL_LM", generates=True)
every = pytest.mark.parametrize("base", [bases.LLAMA, bases.GPT2, MISTRAL, BIASES], ids=str)


def fields(base: Base, **changes: Any) -> dict[str, Any]:
    return {"peft_type": "ADAPTION_PROMPT", "task_type": base.task, **SAMPLE.config, **changes}


def padded(base: Base) -> Inputs:
    inputs = base.inputs(3)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :2] = mask[2, :4] = 0
    return {**inputs, "attention_mask": mask}


@every
def test_the_output_is_that_of_the_reference(base: Base, shared_checkpoint: Any) -> None:
    """Each of two adapters, none, one deleted; generated too."""
    folders = shared_checkpoint(base, fields(base)), shared_checkpoint(base, fields(base, **SAMPLE.small), seed=1)
    pair = load_both(base, *folders)
    before = pair.assert_equal()
    bare = run(base.build(), base.inputs(3))
    assert differ(before, bare)
    assert_close(run(pair.ours, padded(base)), run(pair.reference, padded(base)))
    assert torch.equal(bases.generate(pair.ours, base), bases.generate(pair.reference, base))
    pair.each(lambda model: model.set_adapter("second"))
    assert differ(pair.assert_equal(), before)
    with pair.ours.disable_adapter():
        assert torch.equal(run(pair.ours, base.inputs(3)), bare)
    for clone in (copy.deepcopy(pair.ours), pickle.loads(pickle.dumps(pair.ours))):
        assert torch.equal(run(clone, base.inputs(3)), run(pair.ours, base.inputs(3)))
    pair.ours.set_adapter("default")
    pair.ours.delete_adapter("second")
    assert torch.equal(run(pair.ours, base.inputs(3)), before)


@every
def test_a_new_one_is_trained_saved_and_loaded_as_in_the_reference(base: Base, tmp_path: Path) -> None:
    losses, inputs = [], base.inputs(3)
    for library in (peft, splice):
        torch.manual_seed(4)
        model = library.get_peft_model(base.build(), library.get_peft_config(fields(base, adapter_layers=2)))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(4):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.save_pretrained(str(tmp_path / library.__name__))
        assert all(name.endswith(("adaption_prompt", "adaption_gate")) for name in trained) and len(trained) == 4
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-4)
    assert list(tensors_in(tmp_path / "splice")) == list(tensors_in(tmp_path / "peft"))
    assert config_in(tmp_path / "splice") == config_in(tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(base.build(), str(tmp_path / "splice"))
    assert_close(run(theirs, inputs), run(model.eval(), inputs))
    again = splice.PeftModel.from_pretrained(base.build(), tmp_path / "splice", is_trainable=True)
    assert again.training or torch.equal(run(again, inputs), run(model, inputs))
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained


@every
def test_names_and_the_base(base: Base, shared_checkpoint: Any, tmp_path: Path) -> None:
    """The reference's names for the adapter called "default"; the base is what it was, with adapters and after them."""
    network, inputs = base.build(), base.inputs(3)
    before, state = Snapshot.of(network), dict(network.state_dict())
    folder = shared_checkpoint(base, fields(base))
    pair = load_both(base, folder)
    assert {name for name, _ in named(pair.ours)} == {name for name, _ in pair.reference.named_parameters()}
    model = splice.PeftModel.from_pretrained(network, folder)
    model.load_adapter(shared_checkpoint(base, fields(base), seed=1), "second")
    assert list(splice.get_base_model_state_dict(model)) == list(state)
    model.save_pretrained(tmp_path)
    assert_same_tensors(tensors_in(tmp_path), tensors_in(folder))
    assert_same_tensors(splice.get_peft_model_state_dict(model, model.state_dict()), tensors_in(folder))
    model.load_adapter(shared_checkpoint(base, fields(base), seed=1), "default")
    model.set_adapter("second")
    second = run(model, inputs)
    model.set_adapter("default")
    assert torch.equal(run(model, inputs), second)
    with pytest.raises(NotImplementedError, match="merge"):
        model.merge_adapter()
    model.delete_adapter("second")
    assert model.unload() is network
    before.assert_same(network)


@every
def test_rows_with_adapters_of_their_own(base: Base, shared_checkpoint: Any) -> None:
    model = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, fields(base)))
    model.load_adapter(shared_checkpoint(base, fields(base, **SAMPLE.small), seed=1), "second")
    alone, inputs = {}, padded(base)
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = run(model, inputs)
    with model.disable_adapter():
        alone["__base__"] = run(model, inputs)
    names = ["second", "__base__", "default"]
    mixed = run(model, inputs, adapter_names=names)
    assert_close(mixed, torch.stack([alone[name][row] for row, name in enumerate(names)]))
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False, adapter_names=names, num_beams=2)
    model.set_adapter("second")
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)[0], generated[0])


@every
def test_half_precision(base: Base, shared_checkpoint: Any) -> None:
    """Its tensors stay in the base's dtype."""
    pair = load_both(base, shared_checkpoint(base, fields(base), dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert {p.dtype for name, p in pair.ours.named_parameters() if "adaption" in name} == {torch.bfloat16}
    assert_close(run(pair.ours, base.inputs(3)), run(pair.reference, base.inputs(3)))


def test_a_new_one_changes_nothing() -> None:
    inputs = bases.LLAMA.inputs(3)
    model = splice.get_peft_model(bases.LLAMA.build(), splice.get_peft_config(fields(bases.LLAMA)))
    assert torch.equal(run(model, inputs), run(bases.LLAMA.build(), inputs))


@pytest.mark.parametrize(
    ("base", "changes", "said"),
    [
        (bases.LLAMA, {"adapter_layers": 3}, "more adapter layers '3' than the model has '2'"),
        (bases.LLAMA, {"adapter_layers": None}, "`adapter_layers` must be a whole number of at least 0, got None"),
        (bases.LLAMA, {"adapter_len": 0}, "`adapter_len` must be a whole number of at least 1, got 0"),
        (bases.LLAMA, {"target_modules": "attention"}, "attention"),
        (bases.BERT, {}, "no default for model_type 'bert'"),
    ],
)
def test_configs_that_are_wrong(base: Base, changes: dict[str, Any], said: str) -> None:
    network = base.build()
    before = Snapshot.of(network)
    with pytest.raises(ValueError, match=said):
        splice.get_peft_model(network, splice.get_peft_config(fields(base, **changes)))
    before.assert_same(network)


def test_other_layers_are_refused() -> None:
    config = splice.get_peft_config(fields(bases.BERT, target_modules="self"))
    with pytest.raises(
        UnsupportedLayerError, match=r"cannot be put on a Bert\w*SelfAttention.*LlamaAttention, Mistral"
    ):
        splice.get_peft_model(bases.BERT.build(), config)


def test_no_number_of_layers_means_all(tmp_path: Path) -> None:
    """As in the reference, where 0 counts from the first one."""
    for library in (peft, splice):
        config = library.get_peft_config(fields(bases.LLAMA, adapter_layers=0))
        model = library.get_peft_model(bases.LLAMA.build(), config)
        assert sum("adaption_gate" in name for name, _ in model.named_parameters()) == 2
