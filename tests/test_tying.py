"""Embeddings and heads that share a weight, and single rows of embeddings: who follows whom, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from tests import bases
from tests.bases import run
from tests.broken import unchanged
from tests.comparing import assert_close, assert_same_tensors, load_both, parameters_of, tensors_in
from tests.conftest import write_checkpoint

LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def new(library: Any, base: bases.Base, **fields: Any) -> Any:
    """A new adapter, with the rows that are trained filled with numbers."""
    return library.get_peft_model(base.build(), library.LoraConfig(**{**LORA, **fields}))


def equal(base: bases.Base, tmp_path: Path, **fields: Any) -> Any:
    """Load the same adapter with both libraries, compare all that can be, and return splice's model."""
    folder = write_checkpoint(tmp_path / "a", base, {**LORA, **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = load_both(base, folder)
    output = pair.assert_equal()
    assert not torch.allclose(output, run(base.build(), base.inputs(3)), atol=1e-3)
    assert parameters_of(pair.ours) == parameters_of(pair.reference)
    pair.ours.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    assert_same_tensors(tensors_in(tmp_path / "again"), tensors_in(folder))
    with pair.ours.disable_adapter():
        assert torch.equal(run(pair.ours, base.inputs(3)), run(base.build(), base.inputs(3)))
    return pair.ours


# -- rows of single tokens

ROWS: dict[str, Any] = {
    "a list": [1, 5, 30],
    "the input embeddings by name": {"embed_tokens": [1, 5]},
    "the head by name": {"lm_head": [2, 7]},
    "both, the same rows": {"embed_tokens": [1, 5], "lm_head": [1, 5]},
    "both, other rows": {"embed_tokens": [1, 5], "lm_head": [2, 5, 9]},
}


@pytest.mark.parametrize("base", [bases.LLAMA, bases.TIED], ids=str)
@pytest.mark.parametrize("what", ROWS)
def test_rows_of_tied_and_other_embeddings(what: str, base: bases.Base, tmp_path: Path) -> None:
    model = equal(base, tmp_path, trainable_token_indices=ROWS[what])
    stored = [name for name in tensors_in(tmp_path / "a") if "token_adapter" in name]
    follows = base is bases.TIED and what == "both, the same rows"
    assert len(stored) == (1 if follows or not what.startswith("both") else 2)
    network = model.get_base_model()
    if base is bases.TIED and what in ("a list", "the input embeddings by name", "both, the same rows"):
        hidden = torch.eye(16)
        rows = network.get_input_embeddings()(torch.arange(bases.VOCABULARY))
        assert_close(network.lm_head(hidden).T, rows)  # the two ends are still one


def test_other_rows_for_tied_layers_cannot_be_tied(tmp_path: Path) -> None:
    fields = {"trainable_token_indices": ROWS["both, other rows"], "ensure_weight_tying": True}
    for library in (peft, splice):
        with pytest.raises(ValueError, match="Cannot ensure weight tying when different token indices are specified"):
            new(library, bases.TIED, **fields)


def test_a_layer_named_in_two_ways(tmp_path: Path) -> None:
    """Its rows and the whole of it; or rows of a target."""
    for library in (peft, splice):
        with pytest.raises(ValueError, match="already marked to be trained fully|already listed|modules_to_save"):
            new(library, bases.LLAMA, trainable_token_indices={"embed_tokens": [1]}, modules_to_save=["embed_tokens"])
    network = bases.LLAMA.build()
    config = splice.LoraConfig(r=2, target_modules=["embed_tokens"], trainable_token_indices=[1])
    with (
        unchanged(network),
        pytest.raises(TypeError, match="trainable_token_indices cannot be applied to 'model.embed_tokens'"),
    ):
        splice.get_peft_model(network, config)


def test_rows_of_a_layer_that_is_not_there() -> None:
    for library in (peft, splice):
        with pytest.raises(ValueError, match="wte"):
            new(library, bases.LLAMA, trainable_token_indices={"wte": [1]})


def test_a_target_that_is_also_saved_whole_is_saved_whole(tmp_path: Path) -> None:
    model = equal(bases.LLAMA, tmp_path, target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"])
    assert not any("lm_head.lora" in name for name in splice.get_peft_model_state_dict(model))
    for library in (peft, splice):
        with pytest.raises(ValueError, match="excluded|No modules were targeted"):
            new(library, bases.LLAMA, target_modules=["lm_head"], modules_to_save=["lm_head"])


def two(tmp_path: Path, rows: list[int]) -> Any:
    """Two adapters with rows of their own."""
    folders = [
        write_checkpoint(tmp_path / str(seed), bases.LLAMA, {**LORA, "trainable_token_indices": own}, seed)
        for seed, own in enumerate(([1, 5], rows))
    ]
    model = splice.PeftModel.from_pretrained(bases.LLAMA.build(), str(folders[0]))
    model.load_adapter(str(folders[1]), adapter_name="other")
    return model


def test_rows_of_two_adapters_at_once(tmp_path: Path) -> None:
    """Which the reference cannot have active together."""
    model = two(tmp_path, [2, 9])
    model.base_model.set_adapter(["default", "other"])
    found = model.get_base_model().get_input_embeddings()(torch.arange(bases.VOCABULARY))
    expected = bases.LLAMA.build().get_input_embeddings().weight.detach().clone()
    for seed, rows in enumerate(([1, 5], [2, 9])):
        tensors = tensors_in(tmp_path / str(seed))
        expected[rows] = next(tensor for name, tensor in tensors.items() if "token_adapter" in name)
    assert torch.equal(found, expected)


def test_a_row_that_two_active_adapters_replace_is_refused(tmp_path: Path) -> None:
    """Neither of the two can win in silence."""
    model = two(tmp_path, [5, 9])
    with pytest.raises(ValueError, match=r"both bring rows for the tokens \[5\]"):
        model.base_model.set_adapter(["default", "other"])
        run(model, bases.LLAMA.inputs(3))
    model.set_adapter("other")
    run(model, bases.LLAMA.inputs(3))


# -- whole embeddings and heads

SAVED = (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["model.embed_tokens"])


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("saved", SAVED, ids=str)
def test_saved_whole(saved: list[str], tied: bool, tmp_path: Path) -> None:
    """With `ensure_weight_tying` the copies stay one tensor, without it each is its own: both ways round."""
    model = equal(bases.TIED, tmp_path, modules_to_save=saved, ensure_weight_tying=tied)
    network = model.get_base_model()
    if tied:
        embeddings, head = network.get_input_embeddings(), network.get_output_embeddings()
        assert embeddings.modules_to_save["default"].weight is head.modules_to_save["default"].weight
        assert set(model.peft_config["default"].modules_to_save) == {*saved, "model.embed_tokens"} - {"lm_head"}
    assert model.unload().lm_head.weight is network.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]], ids=str)
def test_as_targets(targets: list[str], tied: bool, tmp_path: Path) -> None:
    model = equal(bases.TIED, tmp_path, target_modules=targets, ensure_weight_tying=tied)
    names = [
        name for name in splice.get_peft_model_state_dict(model, save_embedding_layers=False) if "q_proj" not in name
    ]
    assert len(names) == (4 if tied or len(targets) == 3 else 2)
    if tied:
        embeddings, head = model.get_base_model().get_input_embeddings(), model.get_base_model().lm_head
        a = embeddings.lora_embedding_A["default"]
        assert head.lora_B["default"].weight.data_ptr() == a.data_ptr()


def test_an_expression_that_matches_both_ends_of_a_tie(tmp_path: Path) -> None:
    """It cannot be taken apart: the head goes on being matched, and follows the embeddings all the same."""
    targets = r".*(embed_tokens|lm_head|q_proj)"
    model = equal(bases.TIED, tmp_path, target_modules=targets, ensure_weight_tying=True)
    leaders = {path: set(layer.leaders) for path, layer in model.base_model.placed["default"].items() if layer.leaders}
    assert leaders == {"lm_head": {"lora_A.weight", "lora_B.weight"}}


def test_tied_layers_learn_as_one(tmp_path: Path) -> None:
    """A step of training keeps the two ends equal, as the reference's does."""
    folder = write_checkpoint(
        tmp_path, bases.TIED, {**LORA, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}
    )
    found = []
    for library in (peft, splice):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.PeftModel.from_pretrained(bases.TIED.build(), str(folder), is_trainable=True)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        model(**bases.TIED.inputs(3)).logits.square().sum().backward()
        optimizer.step()
        network = model.get_base_model()
        ends = network.get_input_embeddings(), network.get_output_embeddings()
        one, two = (end.modules_to_save["default"].weight for end in ends)
        assert torch.equal(one, two)
        found.append(one.detach())
    assert_close(found[1], found[0], factor=10)


@pytest.mark.parametrize("at_the_head", [False, True], ids=["embeddings", "head"])
def test_what_is_put_in_the_place_of_a_parameter_at_one_end_stands_at_both(at_the_head: bool, tmp_path: Path) -> None:
    """transformers' loader exchanges the parameters of one layer after the other, and knows of no ties."""
    model = equal(bases.TIED, tmp_path, target_modules=["embed_tokens"], ensure_weight_tying=True)
    embeddings, head = model.get_base_model().get_input_embeddings(), model.get_base_model().lm_head
    new = torch.randn(2, bases.VOCABULARY)
    if at_the_head:
        head.lora_B["default"].weight = nn.Parameter(new.T.contiguous())
    else:
        embeddings.lora_embedding_A.default = nn.Parameter(new)
    assert torch.equal(embeddings.lora_embedding_A["default"], new) and torch.equal(
        head.lora_B["default"].weight, new.T
    )
    hidden, rows = torch.eye(16), embeddings(torch.arange(bases.VOCABULARY))
    assert_close(head(hidden).T, rows)


# -- what is warned of

_HEAD = {"modules_to_save": ["lm_head"]}
WARNED: dict[str, tuple[bases.Base, dict[str, Any], str]] = {
    "where nothing is tied": (bases.LLAMA, {"ensure_weight_tying": True, **_HEAD}, "no tied modules were found"),
    "where nothing tied is named": (bases.TIED, {"ensure_weight_tying": True}, "no tied modules are added"),
    "not asked for": (bases.TIED, _HEAD, "ensure_weight_tying"),
}


@pytest.mark.parametrize("what", WARNED)
def test_warnings(what: str) -> None:
    base, fields, text = WARNED[what]
    for library in (peft, splice):
        with pytest.warns(UserWarning, match=text):
            new(library, base, **fields)


def test_a_tied_head_under_a_variant_is_refused() -> None:
    network = bases.TIED.build()
    config = splice.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True, use_dora=True)
    with unchanged(network), pytest.raises(NotImplementedError, match="`ensure_weight_tying` is not supported"):
        splice.get_peft_model(network, config)


def test_copies_that_differ_in_the_file_are_refused(tmp_path: Path) -> None:
    """The config says that they are one."""
    from safetensors.torch import save_file

    folder = write_checkpoint(
        tmp_path, bases.TIED, {**LORA, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}
    )
    tensors = tensors_in(folder)
    key = next(name for name in tensors if "lm_head" in name)
    save_file({**tensors, key: tensors[key] + 1}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    network = bases.TIED.build()
    with (
        unchanged(network),
        pytest.raises(splice.AdapterMismatchError, match="has different tensors for .*lm_head.*the layers share them"),
    ):
        splice.PeftModel.from_pretrained(network, folder)
    assert isinstance(network.lm_head, nn.Linear)
