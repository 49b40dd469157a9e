"""The grammar of keys and its inverse; what `key_mapping` does to them; and that adapter names take no part in them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import splice
from splice.checkpoint.keys import PREFIX, Key, format_key, parse_key, renamed
from splice.kinds.registry import all_methods
from tests import broken
from tests.broken import llama, load, output, parts

METHODS = list(all_methods().values())
NAMES = sorted({name for method in METHODS for name in method.tensor_names})
quick = settings(max_examples=200, deadline=None)

# Components of paths: ordinary ones, and those that are words of the grammar themselves.
components = st.sampled_from(
    [*NAMES, "layers", "0", "17", "q_proj", "default", "weight", "bias", "base_layer", "base_model", "model", "adapters",
     "lora_", "modules_to_save", "original_module", "x" * 40, "ä", "with space", "-"]
)  # fmt: skip
paths = st.lists(components, min_size=1, max_size=6).map(".".join)


# -- key -> parts -> key


@quick
@given(path=paths, data=st.data())
def test_a_key_is_taken_apart_and_put_together_again(path: str, data: st.DataObject) -> None:
    """For every name of every method, also below modules that are called like one."""
    method = data.draw(st.sampled_from(METHODS))
    name = data.draw(st.sampled_from(sorted(method.tensor_names)))
    suffix = name + data.draw(st.sampled_from(["", ".weight", ".bias"]))
    key = format_key(path, suffix)
    found = parse_key(key, method.tensor_names)
    assert found == Key(path, suffix)
    assert str(found) == key


@quick
@given(key=st.text(max_size=30) | paths.map(lambda path: PREFIX + path) | paths)
def test_any_text_is_a_key_or_it_is_not(key: str) -> None:
    for method in METHODS:
        found = parse_key(key, method.tensor_names)
        assert found is None or str(found) == key


@pytest.mark.parametrize(
    "key",
    ["", PREFIX, "base_model.model", "base_model.model.lora_A", "model.layers.0.q.lora_A.weight", PREFIX + "a.weight",
     PREFIX + "a.lora_Aweight", PREFIX + "a.xlora_A.weight", "Base_model.model.a.lora_A.weight"],
)  # fmt: skip
def test_what_is_no_key_of_lora(key: str) -> None:
    assert parse_key(key, {"lora_A", "lora_B"}) is None


def test_the_last_name_counts() -> None:
    assert parse_key(PREFIX + "lora_A.lora_B.lora_A.weight", {"lora_A", "lora_B"}) == Key(
        "lora_A.lora_B", "lora_A.weight"
    )


class _Named(nn.Module):
    """Base layers that are called like the parts of a key."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Sequential(nn.Linear(4, 4))
        self.default = nn.Linear(4, 4)
        self.base_layer = nn.ModuleDict({"weight": nn.Linear(4, 4), "lora_B": nn.Linear(4, 4)})
        self.model = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.lora_A, self.default, *self.base_layer.values(), self.model):
            x = torch.tanh(layer(x))
        return x


TARGETS = ["lora_A.0", "default", "base_layer.weight", "base_layer.lora_B", "model"]


@pytest.mark.parametrize("name", ["default", "lora_A", "model", "weight", "a.b", "0", "base_layer", "ü", "adapters"])
def test_the_adapters_name_is_in_no_key(name: str, tmp_path: Path) -> None:
    """The base has modules of all these names; every adapter is saved alike and comes back."""
    torch.manual_seed(1)
    base = _Named()
    model = splice.get_peft_model(base, splice.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), name)
    x = torch.randn(3, 4)
    expected = model.eval()(x)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    keys = sorted(f"{PREFIX}{path}.lora_{ab}.weight" for path in TARGETS for ab in "AB")
    assert sorted(broken.tensors_in(folder)) == keys
    again = splice.PeftModel.from_pretrained(model.unload(), folder, adapter_name=name)
    assert torch.equal(again(x), expected)


def test_adapters_beside_one_another_save_what_they_save_alone(tmp_path: Path) -> None:
    """Names that hold one another, or are components of paths, do not get into each other's way."""
    names = ["lora", "lora_A", "self_attn", "q_proj", "fir", "first", "model", "model.layers"]
    made = {name: parts(seed=seed) for seed, name in enumerate(names)}
    model = None
    for name, part in made.items():
        folder = part.write(tmp_path / "in" / name)
        if model is None:
            model = load(folder, adapter_name=name)
        else:
            model.load_adapter(folder, name)
    assert model is not None
    model.save_pretrained(tmp_path / "out")
    for name, part in made.items():
        saved = broken.tensors_in(tmp_path / "out" / name)
        assert set(saved) == set(part.tensors)
        assert all(torch.equal(saved[key], tensor) for key, tensor in part.tensors.items())


# -- key_mapping

MAPPINGS: dict[str, dict[str, str]] = {
    "nothing": {},
    "a front": {r"^model\.": "model.language_model."},
    "the first that is found": {r"layers\.0": "layers.5", r"layers\.\d": "layers.7"},
    "each occurrence": {"l": "L"},
    "groups": {r"layers\.(\d)\.(\w+)": r"blocks.\2.\1"},
    "one that is not found, then one that is": {"nowhere": "x", "self_attn": "attention"},
    "looking ahead": {r"^(?!language_model)": "language_model."},
    "the name of the tensor": {"lora_A": "lora_C"},
    "the prefix is out of reach": {"base_model": "gone"},
    "everything behind a dot": {r"\.": "_"},
}


@pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)
def test_names_are_mapped_as_by_the_reference(mapping: dict[str, str], tmp_path: Path) -> None:
    folder = parts().write(tmp_path)
    expected = peft.load_peft_weights(str(folder), key_mapping=mapping)
    ours = splice.load_peft_weights(folder, key_mapping=mapping)
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_the_order_of_the_mapping_decides() -> None:
    keys = [PREFIX + "a.b.lora_A"]
    assert list(renamed(keys, {"a": "x", "b": "y"})) == [PREFIX + "x.b.lorx_A"]
    assert list(renamed(keys, {"b": "y", "a": "x"})) == [PREFIX + "a.y.lora_A"]


def test_the_short_prefix() -> None:
    """Heads of prompt learning have it."""
    assert list(renamed(["base_model.head.weight"], {"^head": "score"})) == ["base_model.score.weight"]


def test_a_name_without_prefix_is_refused_as_by_the_reference(tmp_path: Path) -> None:
    folder, model = parts().renamed(lambda name: name.removeprefix(PREFIX)).write(tmp_path), llama()
    with pytest.raises(ValueError, match="key_mapping"):
        peft.load_peft_weights(str(folder), key_mapping={"a": "b"})
    with pytest.raises(ValueError, match="`key_mapping` needs keys that begin with 'base_model.model.'"):
        splice.load_peft_weights(folder, key_mapping={"a": "b"})
    with broken.unchanged(model), pytest.raises(ValueError, match="`key_mapping` needs keys that begin with"):
        load(folder, model, key_mapping={"a": "b"})


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    folder, model = parts().write(tmp_path), llama()
    with broken.unchanged(model), pytest.raises(ValueError, match="the same name"):
        load(folder, model, key_mapping={r"layers\.\d": "layers.0"})


@pytest.mark.parametrize("pattern", ["(", "*", "[a"])
def test_an_expression_that_is_none_leaves_the_model_alone(pattern: str, tmp_path: Path) -> None:
    import re

    folder, model = parts().write(tmp_path), llama()
    with broken.unchanged(model), pytest.raises((ValueError, re.error)):
        load(folder, model, key_mapping={pattern: "x"})


def _renamed_layers() -> Any:
    return parts().renamed(lambda name: name.replace("self_attn", "attention"))


def test_a_mapping_loads_what_was_renamed(tmp_path: Path) -> None:
    folder = _renamed_layers().write(tmp_path / "renamed")
    mapping = {"attention": "self_attn"}
    model = load(folder, key_mapping=mapping)
    torch.testing.assert_close(output(model), output(broken.by_reference(folder, key_mapping=mapping)))
    assert model.load_report.placed == 8
    model.load_adapter(folder, "second", key_mapping=mapping)
    model.set_adapter("second")
    assert torch.equal(output(model), output(load(parts().write(tmp_path / "straight"))))


class _Renamed:
    """What transformers puts on classes whose modules have other names than in older checkpoints."""

    _checkpoint_conversion_mapping = {"attention": "self_attn"}


def test_the_mapping_of_the_base_models_class(tmp_path: Path) -> None:
    """`from_pretrained` takes it by itself; `load_adapter` does not, as in the reference, and finds the new names out."""
    folder = _renamed_layers().write(tmp_path / "renamed")
    straight = parts().write(tmp_path / "straight")
    network = llama()
    network.__class__ = type("LlamaForCausalLM", (_Renamed, type(network)), {})
    model = load(folder, network)
    assert torch.equal(output(model), output(load(straight)))
    assert not model.load_report.notes
    model.load_adapter(folder, "second")
    assert model.load_report.notes
    model.set_adapter("second")
    assert torch.equal(output(model), output(load(straight)))
    reference = llama()
    reference.__class__ = type("LlamaForCausalLM", (_Renamed, type(reference)), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(output(broken.by_reference(folder, reference)), output(model))


def test_an_empty_mapping_replaces_that_of_the_class(tmp_path: Path) -> None:
    folder = _renamed_layers().write(tmp_path)
    network = llama()
    network.__class__ = type("LlamaForCausalLM", (_Renamed, type(network)), {})
    assert load(folder, network, key_mapping={"nowhere": "x"}).load_report.notes
