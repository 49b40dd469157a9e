"""SHADOW beside the reference: a small network whose state goes along with the hidden states."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import splice
from splice.errors import AdapterMismatchError
from tests import bases
from tests.bases import VOCABULARY, Base, Inputs, run
from tests.comparing import Snapshot, assert_close, assert_same_tensors, config_in, differ, load_both, tensors_in
from tests.samples import SAMPLES

SAMPLE = SAMPLES[splice.PeftType.SHADOW]
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _of(family: str, **options: Any) -> Callable[[], nn.Module]:
    """A network of transformers by the front of its classes."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
        model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
        return model

    return make


def _base(name: str, make: Callable[[], nn.Module]) -> Base:
    return Base(name, make, bases.LLAMA.inputs, task="CAUSAL_LM", generates=True)


DEEP = _base("llama_deep", _of("Llama", num_key_value_heads=1, initializer_range=0.2))
GEMMA2 = _base("gemma2", _of("Gemma2", num_key_value_heads=1, head_dim=8, sliding_window=4, initializer_range=0.2))
QWEN3 = _base("qwen3", _of("Qwen3", num_key_value_heads=1, head_dim=8, initializer_range=0.2))
NEOX = _base("gpt_neox", _of("GPTNeoX", rotary_pct=0.5, initializer_range=0.2, hidden_dropout=0.0))
OPT = _base("opt", _of("OPT", ffn_dim=24, word_embed_proj_dim=16, dropout=0.0, init_std=0.2))
FAMILIES = [bases.LLAMA, bases.GPT2, DEEP, GEMMA2, QWEN3, NEOX, OPT]
every = pytest.mark.parametrize("base", FAMILIES, ids=str)


def fields(base: Base, **changes: Any) -> dict[str, Any]:
    return {"peft_type": "SHADOW", "task_type": base.task, **SAMPLE.config, **changes}


def padded(base: Base) -> Inputs:
    inputs = base.inputs(3)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :2] = mask[2, :4] = 0
    return {**inputs, "attention_mask": mask}


def losses(model: Any, inputs: Inputs) -> tuple[float, float]:
    """The loss of the model, and that of the shadow network."""
    output = model(**inputs, labels=inputs["input_ids"])
    return output.loss.item(), output.shadow_loss.item()


@every
def test_the_output_is_that_of_the_reference(base: Base, shared_checkpoint: Any) -> None:
    """Each of two adapters, none, one deleted; the losses; generated too, greedily and by beams, padded on the left."""
    folders = shared_checkpoint(base, fields(base)), shared_checkpoint(base, fields(base), seed=1)
    pair = load_both(base, *folders)
    before, inputs = pair.assert_equal(), padded(base)
    bare = run(base.build(), base.inputs(3))
    assert differ(before, bare)
    assert_close(run(pair.ours, inputs), run(pair.reference, inputs))
    assert losses(pair.ours, inputs) == pytest.approx(losses(pair.reference, inputs), rel=1e-5)
    assert pair.ours.base_model.last_shadow_loss.item() == pytest.approx(losses(pair.ours, inputs)[1])
    for beams in (1, 2):
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
        # With this version of transformers the reference's shadow network forgets what it has seen between the steps.
        expected = pair.reference.generate(**inputs, **options, use_cache=False)
        assert torch.equal(pair.ours.generate(**inputs, **options), expected)
        assert torch.equal(pair.ours.generate(**inputs, **options, use_cache=False), expected)
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
@pytest.mark.parametrize("option", ["", *SAMPLE.options])
def test_a_new_one_is_trained_saved_and_loaded_as_in_the_reference(base: Base, option: str, tmp_path: Path) -> None:
    if base is not DEEP and option == "narrow" and base is not bases.GPT2:
        pytest.skip("sizes are the config's business, and two kinds of them are enough")
    found, inputs = [], base.inputs(3)
    own = SAMPLE.options.get(option, {})
    for library in (peft, splice):
        torch.manual_seed(4)
        config = library.get_peft_config(fields(base, shadow_dropout=0.0, **own))
        model = library.get_peft_model(base.build(), config)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            output = model(**inputs, labels=inputs["input_ids"])
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            found += [output.loss.item(), output.shadow_loss.item()]
        found.append(sum(p.grad is None for p in model.parameters() if p.requires_grad))
        model.save_pretrained(str(tmp_path / library.__name__))
        names = trained if library is peft else names
    assert sorted(trained) == sorted(names)
    assert found[7:] == pytest.approx(found[:7], rel=1e-4)
    ours, theirs = tensors_in(tmp_path / "splice"), tensors_in(tmp_path / "peft")
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name])
    assert config_in(tmp_path / "splice") == config_in(tmp_path / "peft")
    reference = peft.PeftModel.from_pretrained(base.build(), str(tmp_path / "splice"))
    assert_close(run(reference, inputs), run(model.eval(), inputs))
    again = splice.PeftModel.from_pretrained(base.build(), tmp_path / "splice", is_trainable=True)
    assert [name for name, p in again.named_parameters() if p.requires_grad] == trained
