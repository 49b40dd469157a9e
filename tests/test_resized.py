"""A vocabulary that was resized before training: its embeddings are saved with the adapter, as the reference does."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch

import splice
from tests import bases
from tests.bases import run
from tests.broken import Around, llama, load, output, parts, unchanged
from tests.comparing import tensors_in

CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("size", [48, bases.VOCABULARY])
def test_embeddings_are_saved_if_their_number_changed(size: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    bases.LLAMA.build().save_pretrained(tmp_path / "base")
    for library in (peft, splice):
        network = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        network.resize_token_embeddings(size, mean_resizing=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(network, library.get_peft_config(CONFIG))
            model.save_pretrained(str(tmp_path / library.__name__))
    theirs, ours = (tensors_in(tmp_path / name) for name in ("peft", "splice"))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert any("embed_tokens" in name for name in ours) == (size != bases.VOCABULARY)
    again = splice.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "splice", resize_vocabulary=True
    )
    assert run(again, bases.LLAMA.inputs(3)).shape[-1] == size


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 3], "target_modules": ["embed_tokens"]},
        {**CONFIG, "target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [1]},
        {**CONFIG, "target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["tokens", "tokens beside", "lora"],
)
def test_embeddings_are_saved_where_they_are_targets_but_for_trained_tokens(fields: dict[str, object]) -> None:
    """Rows of tokens hold all that an adapter of them changes."""
    names = []
    for library in (peft, splice):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(bases.LLAMA.build(), library.get_peft_config(dict(fields)))
            names.append(set(library.get_peft_model_state_dict(model)))
    assert names[0] == names[1]


def test_an_adapter_on_the_embeddings_stands_in_the_way(tmp_path: Path) -> None:
    """It would no longer fit: the load is refused, and says what to do; nothing has changed."""
    first = parts(target_modules=["embed_tokens"]).write(tmp_path / "first")
    network = llama()
    network.resize_token_embeddings(48, mean_resizing=False)
    second = parts(network=network, target_modules=["embed_tokens"]).write(tmp_path / "second")
    model = load(first)
    before = output(model)
    with unchanged(model), pytest.raises(splice.AdapterMismatchError) as caught:
        model.load_adapter(second, "second", resize_vocabulary=True)
    assert "the adapter 'default' is on 'model.embed_tokens', and would not fit any more" in str(caught.value)
    assert "Load this one first, or onto a base of its own." in str(caught.value)
    assert torch.equal(output(model), before)


def test_what_is_not_of_the_vocabulary_is_refused_as_without_the_option(tmp_path: Path) -> None:
    """The option resizes where that helps; the report of what else does not fit is the same with it and without."""
    wrong = parts()
    name = next(name for name in wrong.tensors if "layers.0.self_attn.q_proj.lora_A" in name)
    wrong.tensors[name] = torch.ones(4, 7)
    folder, network = wrong.write(tmp_path), llama()
    before, said = output(network), []
    for options in ({}, {"resize_vocabulary": True}):
        with unchanged(network), pytest.raises(splice.AdapterMismatchError) as caught:
            load(folder, network, **options)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert torch.equal(output(network), before)


def test_a_base_that_cannot_be_resized(tmp_path: Path) -> None:
    network = llama()
    network.resize_token_embeddings(48, mean_resizing=False)
    folder = parts(network=Around(network), target_modules=["embed_tokens"], task_type=None).write(tmp_path)
    base = Around(llama())
    with unchanged(base), pytest.raises(splice.AdapterMismatchError, match="no `resize_token_embeddings`; resize its"):
        load(folder, base, resize_vocabulary=True)


def test_an_adapter_elsewhere_does_not_stand_in_the_way(tmp_path: Path) -> None:
    network = llama()
    network.resize_token_embeddings(48, mean_resizing=False)
    folder = parts(network=network, target_modules=["embed_tokens"]).write(tmp_path / "second")
    model = load(parts(target_modules=["q_proj"]).write(tmp_path / "first"))
    model.load_adapter(folder, "second", resize_vocabulary=True)
    assert output(model).shape[-1] == 48


def test_embeddings_that_cannot_be_found_are_not_saved_and_that_is_said(tmp_path: Path) -> None:
    model = splice.get_peft_model(bases.LINEAR.build(), splice.LoraConfig(target_modules=["first"]))
    with pytest.warns(UserWarning, match="Could not identify the embedding layers of the base model; none are saved"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert all("lora_" in name for name in tensors_in(tmp_path))
