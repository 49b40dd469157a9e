"""New weights over an adapter that is there take the road of a first load: the same readings, checks, notes and errors."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import splice
from splice.errors import AdapterMismatchError
from tests import bases, broken
from tests.bases import run
from tests.broken import PREFIX, SAFETENSORS, Parts, adapter_tensors, llama, load, output, parts, tensors_in, unchanged
from tests.conftest import write_checkpoint
from tests.test_published import Fused, old_vit, vit
from tests.test_stacked_experts import MIXTRAL, adapter, all_names, close, mixtral


def notes_of(model: Any) -> list[str]:
    return list(model.load_report.notes)


def quietly(function: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


# -- names as people wrote them

RENAMED: dict[str, Callable[[str], str]] = {
    "as they should be": lambda name: name,
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "half of the prefix": lambda name: name.removeprefix("base_model."),
    "a wrapper in the path": lambda name: name.replace("layers.", "_orig_mod.layers."),
    "a raw state dict": lambda name: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
    "another front": lambda name: name.replace("model.layers.", "language_model.model.layers."),
    "other names for the layers": lambda name: name.replace("q_proj", "query").replace("v_proj", "value"),
}


@pytest.mark.parametrize("what", RENAMED)
def test_names_that_stray_are_read_as_in_a_first_load(what: str, tmp_path: Path) -> None:
    folder = parts(seed=1).renamed(RENAMED[what]).write(tmp_path / "stray")
    if what == "other names for the layers":
        broken.edited(folder, target_modules=["query", "value"])
    first = load(folder)
    model = load(parts().write(tmp_path / "straight"), is_trainable=True)
    held = adapter_tensors(model)
    result = model.load_adapter(folder, "default", is_trainable=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(output(model), output(first))
    assert notes_of(model) == notes_of(first)
    assert bool(notes_of(first)) == (what != "as they should be")
    assert model.load_report.placed == first.load_report.placed == 8
    assert all(now is then for now, then in zip(adapter_tensors(model).values(), held.values()))
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize("what", RENAMED)
def test_the_same_from_tensors_in_memory(what: str, tmp_path: Path) -> None:
    """Which bring no config: what the names mean is seen by the plan of the adapter alone."""
    made = parts(seed=1)
    expected = output(load(made.write(tmp_path / "a")))
    given = made.renamed(RENAMED[what]).tensors
    model = load(parts().write(tmp_path / "b"))
    model.load_adapter(None, "default", tensors=given)
    assert torch.equal(output(model), expected)
    model = load(parts().write(tmp_path / "b"))
    result = splice.set_peft_model_state_dict(model, given)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(output(model), expected)


def test_layers_that_fit_only_where_the_adapter_has_them(tmp_path: Path) -> None:
    """A first load could not choose between two modules; the adapter that is there is on one of them."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.draft = llama(), llama()

        def forward(self, **inputs: Any) -> Any:
            return self.main(**inputs)

    made = parts(seed=1, task_type=None)
    stray = made.write(tmp_path / "stray")
    there = made.renamed(lambda name: name.replace(PREFIX, PREFIX + "main.", 1))
    there.config["target_modules"] = ".*main.*(q_proj|v_proj)"
    zero = Parts({name: torch.zeros_like(tensor) for name, tensor in there.tensors.items()}, there.config)
    network = Two()
    with unchanged(network), pytest.raises(AdapterMismatchError, match="none of them is chosen for you"):
        broken.load(broken.edited(stray, target_modules=["q_proj", "v_proj"]), network)
    model = load(zero.write(tmp_path / "there"), network)
    model.load_adapter(stray, "default")
    assert torch.equal(output(model), output(load(there.write(tmp_path / "whole"), Two())))


def test_a_model_whose_modules_were_renamed(tmp_path: Path) -> None:
    """By the renamings that its library itself knows."""
    made = parts(network=vit(), target_modules=["q_proj", "v_proj"], task_type=None, modules_to_save=["classifier"])
    model = load(made.write(tmp_path / "a"), vit())
    folder = broken.edited(made.renamed(old_vit).write(tmp_path / "b"), target_modules=["query", "value"])
    first = load(folder, vit())
    for tensor in adapter_tensors(model).values():
        nn.init.zeros_(tensor)
    model.load_adapter(folder, "default")
    for name, tensor in adapter_tensors(model).items():
        assert torch.equal(tensor, adapter_tensors(first)[name]), name
    assert notes_of(model) and set(notes_of(model)) <= set(notes_of(first))
    assert any("encoder.layer" in note for note in notes_of(model))


# -- forms of long ago


def merged_linear(folder: Path, seed: int = 0) -> tuple[Path, torch.Tensor]:
    """A checkpoint of merged-linear LoRA, and what it computes on `Fused`."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, 6, generator=generator), torch.randn(8, 2, 1, generator=generator)
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["qkv"], "enable_lora": [True, False, True],
    }  # fmt: skip
    folder.mkdir(parents=True)
    front = "base_model.model.qkv.lora_"
    save_file({f"{front}A.weight": a, f"{front}B.weight": b}, folder / SAFETENSORS)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, fused(load(folder, Fused()))


def fused(model: Any) -> torch.Tensor:
    return model(torch.linspace(-1, 1, 30).view(5, 6)).detach()


def test_merged_linear_lora(tmp_path: Path) -> None:
    """Over one that was of this form, and over one that is of the plain form."""
    (first, one), (second, two) = (merged_linear(tmp_path / str(seed), seed) for seed in range(2))
    model = load(first, Fused())
    torch.testing.assert_close(fused(model), one)
    notes = notes_of(model)
    model.load_adapter(second, "default")
    assert torch.equal(fused(model), two)
    assert notes_of(model) == notes and "merged-linear LoRA" in notes[0]
    model.save_pretrained(tmp_path / "plain")
    plain = load(tmp_path / "plain", Fused())
    plain.load_adapter(first, "default")
    assert torch.equal(fused(plain), one)
    assert notes_of(plain) == notes


def test_experts_under_their_old_names(tmp_path: Path) -> None:
    folder, expected = adapter(MIXTRAL, all_names(MIXTRAL), tmp_path / "a")
    first = load(folder, mixtral())
    fields = {"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM", "target_modules": sorted(all_names(MIXTRAL))}
    model = splice.get_peft_model(mixtral(), splice.LoraConfig(**fields, init_lora_weights=False)).eval()
    model.load_adapter(folder, "default")
    close(model, expected)
    assert notes_of(model) == notes_of(first) != []


def test_some_of_the_experts_tensors_and_no_others(tmp_path: Path) -> None:
    """What is not in the dict stays as it was, also where what is in it is read in another way."""
    folder, expected = adapter(MIXTRAL, all_names(MIXTRAL), tmp_path / "a")
    model = load(folder, mixtral())
    tensors = tensors_in(folder)
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.zero_()
    result = quietly(lambda: splice.set_peft_model_state_dict(model, experts))
    assert result.unexpected_keys == [] and result.missing_keys
    kept = {name for name, tensor in adapter_tensors(model).items() if not tensor.any()}
    assert kept and all(("self_attn" in name) or ("gate" in name.split(".lora")[0]) for name in kept)
    quietly(lambda: splice.set_peft_model_state_dict(model, tensors))
    close(model, expected)


# -- what else a checkpoint may hold


def with_base_copies(tmp_path: Path) -> tuple[Any, Path, dict[str, torch.Tensor]]:
    """A model with an adapter on its embeddings, and the folder it was saved to: the base's own embeddings are in it."""
    folder = write_checkpoint(
        tmp_path / "a", bases.LLAMA, {"r": 2, "target_modules": ["embed_tokens"], "task_type": "CAUSAL_LM"}
    )
    model = load(folder, bases.LLAMA.build())
    quietly(lambda: model.save_pretrained(tmp_path / "b"))
    tensors = tensors_in(tmp_path / "b")
    assert any(name.endswith("base_layer.weight") for name in tensors)
    return model, tmp_path / "b", tensors


def test_copies_of_the_base_are_compared(tmp_path: Path) -> None:
    model, folder, tensors = with_base_copies(tmp_path)
    expected = run(model, bases.LLAMA.inputs(3))
    for tensor in adapter_tensors(model).values():
        nn.init.ones_(tensor)
    assert model.load_adapter(folder, "default").unexpected_keys == []
    assert torch.equal(run(model, bases.LLAMA.inputs(3)), expected)
    key = next(name for name in tensors if name.endswith("base_layer.weight"))
    other = {**tensors, key: tensors[key] + 1}
    save_file(other, folder / SAFETENSORS)
    with unchanged(model), pytest.raises(AdapterMismatchError, match="holds weights of its base model"):
        model.load_adapter(folder, "default")
    with unchanged(model), pytest.raises(AdapterMismatchError, match="holds weights of its base model"):
        splice.set_peft_model_state_dict(model, other)
    save_file({**tensors, key: tensors[key][:-1]}, folder / SAFETENSORS)
    with unchanged(model), pytest.raises(AdapterMismatchError, match="of another shape"):
        model.load_adapter(folder, "default")


def test_copies_of_the_base_are_compared_with_what_it_was_before_merging(tmp_path: Path) -> None:
    """Another adapter may be in the base's weights at the moment."""
    model, folder, _ = with_base_copies(tmp_path)
    model.add_adapter("merged", splice.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    model.merge_adapter(["merged"])
    assert model.load_adapter(folder, "default").unexpected_keys == []
    other = load(folder, adapter_name="third", network=bases.LLAMA.build())
    other.merge_adapter()
    other.load_adapter(folder, "fourth")


def test_tied_layers_have_one_tensor(tmp_path: Path) -> None:
    fields = {
        "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"],
        "ensure_weight_tying": True,
    }  # fmt: skip
    folder = write_checkpoint(tmp_path, bases.TIED, fields)
    model = quietly(lambda: splice.PeftModel.from_pretrained(bases.TIED.build(), folder))
    expected = run(model, bases.TIED.inputs(3))
    for tensor in adapter_tensors(model).values():
        nn.init.ones_(tensor)
    model.load_adapter(folder, "default")
    assert torch.equal(run(model, bases.TIED.inputs(3)), expected)
    tensors = tensors_in(folder)
    key = next(name for name in tensors if "lm_head" in name)
    save_file({**tensors, key: tensors[key] + 1}, folder / SAFETENSORS)
    with unchanged(model), pytest.raises(AdapterMismatchError, match=r"has different tensors for .*lm_head"):
        model.load_adapter(folder, "default")


def test_biases_that_the_reference_writes_twice(tmp_path: Path) -> None:
    """With every bias trained and a head saved whole, the head's bias stands in the file under three names."""
    network = broken.bert
    made = parts(network=network(), target_modules=["query"], task_type="SEQ_CLS", bias="all")
    for where in ("modules_to_save", "original_module"):
        made.tensors[f"{PREFIX}classifier.{where}.bias"] = made.tensors[f"{PREFIX}classifier.bias"].clone()
    folder = made.write(tmp_path)
    model = load(folder, network())
    assert model.load_adapter(folder, "default").unexpected_keys == []


def test_a_bad_checkpoint_gets_the_same_answer(tmp_path: Path) -> None:
    """Key for key, and with the same advice."""
    made, network = parts(seed=1), llama()
    wrong = {name.replace("self_attn", "attention"): tensor for name, tensor in made.tensors.items()}
    wrong[f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 16)
    folder = Parts(wrong, made.config).write(tmp_path / "bad")
    model = load(parts().write(tmp_path / "good"))
    found = []
    for call in (lambda: load(folder, network), lambda: model.load_adapter(folder, "default")):
        with unchanged(network, model), pytest.raises(AdapterMismatchError) as caught:
            call()
        found.append(caught.value)
    one, two = found
    assert (one.missing, one.unexpected, one.mismatched) == (two.missing, two.unexpected, two.mismatched)
    assert "Likely: there is no module" in str(one) and str(one) == str(two)


def test_another_rank_is_told_as_such(tmp_path: Path) -> None:
    made, network = parts(r=8), llama()
    model = load(parts().write(tmp_path / "a"))
    folder = made.write(tmp_path / "b")
    with unchanged(model), pytest.raises(AdapterMismatchError, match="have rank 8 and the config says 4"):
        model.load_adapter(folder, "default")
    broken.edited(folder, r=2, rank_pattern={"q_proj": 4, "v_proj": 4})
    with unchanged(network), pytest.raises(AdapterMismatchError, match="have rank 8 and the config says 4"):
        load(folder, network)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    """As trainers write them: the weights alone are enough for an adapter that is there."""
    model = load(parts().write(tmp_path / "a"))
    folder = parts(seed=1).write(tmp_path / "b")
    (folder / "adapter_config.json").unlink()
    model.load_adapter(folder, "default")
    assert torch.equal(output(model), output(load(parts(seed=1).write(tmp_path / "c"))))


def test_what_is_said_of_the_config_is_said_again(tmp_path: Path) -> None:
    folder = broken.edited(parts(seed=1).write(tmp_path / "b"), r=4.0)
    first, model = load(folder), load(parts().write(tmp_path / "a"))
    model.load_adapter(folder, "default")
    assert notes_of(model) == notes_of(first) == ["the config has r=4.0: read as 4"]
    assert model.peft_config["default"].lora_alpha == 8


# -- the plan


def plan_in(model: Any, name: str = "default") -> Any:
    return model.base_model.plans[name]


def test_the_plan_is_frozen_and_kept(tmp_path: Path) -> None:
    model = load(parts().write(tmp_path / "a"))
    plan = plan_in(model)
    with pytest.raises(AttributeError):
        plan.missing = ()
    assert plan.fits and set(plan.sources) == set(parts().tensors)
    model.load_adapter(parts(seed=1).write(tmp_path / "b"), "default")
    assert plan_in(model) is plan
    model.load_adapter(tmp_path / "b", "second")
    assert set(model.base_model.plans) == {"default", "second"}
    model.delete_adapter("second")
    assert set(model.base_model.plans) == {"default"}
    bad = Parts({}, parts().config).write(tmp_path / "bad")
    with pytest.raises(AdapterMismatchError):
        model.load_adapter(bad, "third")
    assert set(model.base_model.plans) == {"default"}
    tuner = model.base_model
    model.unload()
    assert not tuner.plans


def test_adapters_that_were_not_loaded_have_a_plan_too(tmp_path: Path) -> None:
    """New ones, combined ones, and those on a network alone."""
    made = parts(seed=1).tensors
    expected = output(load(parts(seed=1).write(tmp_path / "b")))
    config = splice.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = splice.get_peft_model(llama(), copy.deepcopy(config)).eval()
    model.add_adapter("added", copy.deepcopy(config))
    model.add_weighted_adapter(["default", "added"], [0.5, 0.5], "sum", combination_type="linear")
    for name in ("default", "added", "sum"):
        stray = {key.removeprefix(PREFIX): tensor for key, tensor in made.items()}
        model.load_adapter(None, name, tensors=stray)
        model.base_model.set_adapter(name)
        held = splice.get_peft_model_state_dict(model, adapter_name=name)
        assert all(torch.equal(held[key], tensor) for key, tensor in made.items())
    model.set_adapter("added")
    assert torch.equal(output(model), expected)
    network = splice.inject_adapter_in_model(copy.deepcopy(config), llama())
    splice.set_peft_model_state_dict(network, {key.removeprefix(PREFIX): tensor for key, tensor in made.items()})
    assert torch.equal(output(network), expected)


def test_a_copy_of_the_model_has_a_plan_of_its_own(tmp_path: Path) -> None:
    model = load(parts().write(tmp_path / "a"))
    expected, clone = output(model), copy.deepcopy(model)
    base = next(iter(plan_in(clone).placements)).base
    assert any(base is module for module in clone.modules())
    assert not any(base is module for module in model.modules())
    clone.load_adapter(parts(seed=1).write(tmp_path / "b"), "default")
    assert torch.equal(output(clone), output(load(tmp_path / "b")))
    assert torch.equal(output(model), expected)


def test_a_partial_dict_leaves_the_rest_as_it_was(tmp_path: Path) -> None:
    model = load(parts().write(tmp_path / "a"))
    before = {name: tensor.clone() for name, tensor in splice.get_peft_model_state_dict(model).items()}
    given = {n: t for n, t in parts(seed=1).tensors.items() if "layers.0" in n}
    result = quietly(lambda: splice.set_peft_model_state_dict(model, given))
    assert sorted(result.missing_keys) == sorted(set(before) - set(given))
    for name, tensor in splice.get_peft_model_state_dict(model).items():
        assert torch.equal(tensor, given.get(name, before[name])), name
