"""X-LoRA weighs its experts as the reference does; where the reference loses the classifier, here it is saved."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

import splice
from splice.errors import UnsupportedFeatureError
from tests import bases
from tests.bases import run
from tests.comparing import assert_close, differ, tensors_in

BASE = bases.LLAMA
CLASSIFIER = "base_model.internal_xlora_classifier"
Make = Callable[..., tuple[Any, Path]]


def expert(folder: Path, seed: int, **fields: Any) -> str:
    torch.manual_seed(seed)
    named = {"r": 2 + seed, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    network = BASE.build()
    torch.manual_seed(seed)
    peft.get_peft_model(network, peft.LoraConfig(**{**named, **fields})).save_pretrained(str(folder / str(seed)))
    return str(folder / str(seed))


def without_cache() -> Any:
    network = BASE.build()
    network.config.use_cache = False  # else the reference refuses it
    return network


@pytest.fixture
def theirs(tmp_path: Path) -> Make:
    """A model of the reference, and a folder with what it should have saved."""

    def make(**options: Any) -> tuple[Any, Path]:
        targets = [["q_proj", "down_proj"], ["q_proj"], ["v_proj", "q_proj", "embed_tokens"]]
        places = {str(seed): expert(tmp_path, seed, target_modules=on) for seed, on in enumerate(targets)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.XLoraConfig(**{"hidden_size": 16, "task_type": "CAUSAL_LM", "adapters": places, **options})
            model = peft.get_peft_model(without_cache(), config)
            classifier = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith(CLASSIFIER)}
            for tensor in classifier.values():
                tensor.mul_(20)  # so that the weights of a token differ
            model.load_state_dict(classifier, strict=False)
            config.save_pretrained(str(tmp_path / "router"))
        save_file(classifier, tmp_path / "router" / "adapter_model.safetensors")
        return model.eval(), tmp_path / "router"

    return make


def ours(folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`enable_softmax")
        return splice.PeftModel.from_pretrained(BASE.build(), folder, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layerwise_scalings": True},
        {"xlora_depth": 3, "xlora_size": 6},
        {"xlora_depth": 2, "xlora_size": 6, "xlora_dropout_p": 0.0, "softmax_temperature": 0.5},
        {"enable_softmax": False, "global_scaling_weight": 1.5},
        {"top_k_lora": 2},
        {"top_k_lora": 2, "enable_softmax_topk": True, "enable_softmax": False, "layerwise_scalings": True},
    ],
    ids=lambda options: ",".join(options),
)
def test_it_is_the_reference_s(theirs: Make, options: dict[str, Any]) -> None:
    reference, folder = theirs(**options)
    model = ours(folder, is_trainable=True).eval()
    assert model.peft_type == "XLORA" and model.active_adapters == ["default"]
    expected = run(reference, BASE.inputs(3))
    assert_close(run(model, BASE.inputs(3)), expected)
    assert differ(expected, run(BASE.build(), BASE.inputs(3)))
    gradients = []
    for one in (reference, model):
        ids = BASE.inputs(3)["input_ids"]
        one(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.requires_grad})
    assert gradients[1].keys() == gradients[0].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


def test_it_generates_token_by_token(theirs: Make) -> None:
    reference, folder = theirs()
    told = {"input_ids": torch.tensor([[3, 5, 7], [2, 4, 9]]), "max_new_tokens": 6, "do_sample": False}
    given = ours(folder).generate(**told)
    assert torch.equal(given, reference.generate(**told))


def test_weights_of_a_cache_are_refused(theirs: Make) -> None:
    model = ours(theirs()[1])
    cache = BASE.build()(**BASE.inputs(2), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` holds a part of it"):
        model(input_ids=torch.tensor([[1], [2]]), past_key_values=cache)


@pytest.mark.parametrize("options", [{}, {"xlora_depth": 3, "xlora_size": 6}])
def test_what_is_saved_is_whole(theirs: Make, options: dict[str, Any], tmp_path: Path) -> None:
    _, folder = theirs(**options)
    model = ours(folder)
    before = run(model, BASE.inputs(3))
    model.save_pretrained(tmp_path / "saved")
    assert set(tensors_in(tmp_path / "saved")) == set(tensors_in(folder))
    for seed in range(3):
        original, again = tensors_in(tmp_path / str(seed)), tensors_in(tmp_path / "saved" / str(seed))
        assert all(torch.equal(tensor, original[key]) for key, tensor in again.items() if ".lora_" in key)
    assert torch.equal(run(ours(tmp_path / "saved"), BASE.inputs(3)), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(without_cache(), str(tmp_path / "saved"))
    assert_close(run(loaded.eval(), BASE.inputs(3)), before)


def test_a_classifier_that_the_reference_lost_is_missed(theirs: Make, tmp_path: Path) -> None:
    reference, _ = theirs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.save_pretrained(str(tmp_path / "lost"))
    network = BASE.build()
    with pytest.raises(splice.AdapterMismatchError, match=r"(?s)missing .*classifier\.layers\.0\.weight"):
        splice.PeftModel.from_pretrained(network, tmp_path / "lost")
    assert type(network) is type(BASE.build())
    assert {n for n, _ in network.named_parameters()} == {n for n, _ in BASE.build().named_parameters()}


def test_experts_are_where_the_caller_says_under_any_names(theirs: Make, tmp_path: Path) -> None:
    _, folder = theirs()
    before = run(ours(folder), BASE.inputs(3))
    places = {"law": tmp_path / "0", "code": tmp_path / "1", "prose": tmp_path / "2"}
    for place in list(places.values()):
        os.rename(place, f"{place}_moved")
    moved = {name: f"{place}_moved" for name, place in places.items()}
    model = ours(folder, adapters=moved)
    assert list(model.peft_config) == ["0", "1", "2", "default"]
    assert model.peft_config["default"].adapters == moved
    assert torch.equal(run(model, BASE.inputs(3)), before)


def test_rows_may_have_the_mixture_one_expert_or_none(theirs: Make) -> None:
    model = ours(theirs()[1])
    inputs = BASE.inputs(3)
    mixture = run(model, inputs)
    rows = run(model, inputs, adapter_names=["default", "1", "__base__"])
    model.set_adapter("1")
    alone = run(model, inputs)
    assert_close(rows, torch.stack([mixture[0], alone[1], run(BASE.build(), inputs)[2]]))


def test_recomputed_blocks_mix_as_they_did(theirs: Make) -> None:
    _, folder = theirs()
    gradients = []
    for again in (False, True):
        model = ours(folder, is_trainable=True).train()
        if again:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        torch.manual_seed(0)
        ids = BASE.inputs(3)["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for n, p in model.named_parameters() if n.startswith(CLASSIFIER)])
    for once, twice in zip(*gradients):
        assert_close(twice, once)


def test_experts_are_trained_where_the_config_says(theirs: Make) -> None:
    for trained in (False, True):
        model = ours(theirs(use_trainable_adapters=trained)[1], is_trainable=True)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert any(".lora_A.1." in name for name in names) is trained
        assert any(name.startswith(CLASSIFIER) for name in names)


def test_off_and_away_is_the_base(theirs: Make) -> None:
    model = ours(theirs()[1])
    expected = run(BASE.build(), BASE.inputs(3))
    with model.disable_adapter():
        assert torch.equal(run(model, BASE.inputs(3)), expected)
    network = model.unload()
    assert torch.equal(run(network, BASE.inputs(3)), expected)


def test_merged_it_is_the_sum_of_its_experts(theirs: Make) -> None:
    """As in the reference, which does not say so; the router is back when they are taken out again."""
    reference, folder = theirs()
    model, inputs = ours(folder), BASE.inputs(3)
    mixture = run(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.merge_adapter()
    with pytest.warns(
        splice.PeftWarning, match="'default' weighs its experts.*each expert is added in full.*Keep it unmerged"
    ):
        model.merge_adapter()
    merged = run(model, inputs)
    assert differ(merged, mixture)
    assert_close(merged, run(reference, inputs), factor=3)
    model.unmerge_adapter()
    assert torch.equal(run(model, inputs), mixture)
    with pytest.warns(splice.PeftWarning, match="Keep it unmerged"):
        assert_close(run(model.merge_and_unload(), inputs), merged, factor=3)


def test_experts_are_not_added_twice(theirs: Make) -> None:
    """One that is in the weights would be weighed beside that."""
    model, inputs = ours(theirs()[1]), BASE.inputs(3)
    before = run(model, inputs)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'1' without 'default' would have it take effect twice.*set_adapter"):
            merge(adapter_names=["1"])
        assert torch.equal(run(model, inputs), before)
    model.set_adapter("1")
    alone = run(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
    assert_close(run(model, inputs), alone, factor=3)


def test_its_options_can_be_changed_as_in_the_reference(theirs: Make) -> None:
    reference, folder = theirs()
    model = ours(folder)
    outputs, tokens = [], BASE.inputs(1)["input_ids"].shape[1]
    for whole in (reference, model):
        one = whole.base_model
        one.enable_scalings_logging()
        one.set_topk_lora(1)
        one.set_global_scaling_weight(0.5)
        assert one.get_global_scaling_weight() == 0.5
        outputs.append([run(whole, BASE.inputs(rows)) for rows in (1, 3)])
        assert [tuple(w.shape) for w in one.get_scalings_log()] == [(rows, tokens, 7, 3) for rows in (1, 3)]
        assert {length: numbers for length, (numbers, _) in one.get_bucketed_scalings_log().items()} == {tokens: [0, 1]}
        one.clear_scalings_log()
        assert one.get_scalings_log() == []
        one.disable_scalings_logging()
    for given, expected in zip(outputs[1], outputs[0]):
        assert_close(given, expected)


def test_a_new_one_is_made_on_experts(theirs: Make, tmp_path: Path) -> None:
    theirs()
    config = splice.XLoraConfig(hidden_size=16, adapters={str(n): str(tmp_path / str(n)) for n in range(2)})
    model = splice.get_peft_model(BASE.build(), config)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{CLASSIFIER}.layers.0.weight",
        f"{CLASSIFIER}.layers.0.bias",
    }
    assert differ(run(model.eval(), BASE.inputs(3)), run(BASE.build(), BASE.inputs(3)))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"use_dora": True},
            UnsupportedFeatureError,
            r"expert '0' on 'model.layers.0.*cannot be weighed token by token",
        ),
        ({"modules_to_save": ["lm_head"]}, UnsupportedFeatureError, "expert '0' on 'lm_head' cannot be weighed"),
    ],
)
def test_experts_that_cannot_be_weighed_are_refused(
    fields: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    network = BASE.build()
    config = splice.XLoraConfig(hidden_size=16, adapters={"0": expert(tmp_path, 0, **fields)})
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        warnings.simplefilter("ignore")
        splice.get_peft_model(network, config)
    assert {n for n, _ in network.named_parameters()} == {n for n, _ in BASE.build().named_parameters()}


def test_what_the_config_says_is_checked(tmp_path: Path) -> None:
    place = expert(tmp_path, 0)
    for fields, message in (
        ({"adapters": {}}, "`adapters` names none"),
        ({"xlora_depth": 0}, "`xlora_depth` must be at least 1"),
        ({"top_k_lora": 2}, "`top_k_lora` is 2, of 1 experts"),
    ):
        config = splice.XLoraConfig(**{"hidden_size": 16, "adapters": {"0": place}, **fields})
        with pytest.raises(ValueError, match=message):
            splice.get_peft_model(BASE.build(), config)
    other = tmp_path / "other"
    peft.get_peft_model(
        BASE.build(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    ).save_pretrained(str(other))
    with pytest.raises(ValueError, match="an expert of .*XLORA is .*LORA, this is .*IA3"):
        splice.get_peft_model(BASE.build(), splice.XLoraConfig(hidden_size=16, adapters={"0": str(other)}))
