"""Adapters that come as tensors and a config: the same load as from a folder, and nothing is shared with the giver."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import splice
from tests.broken import Parts, adapter_tensors, llama, load, output, parts, unchanged


def config_of(made: Parts) -> splice.PeftConfig:
    return splice.get_peft_config({k: v for k, v in made.config.items() if k != "runtime_config"})


def from_memory(tensors: Any, config: Any, network: Any = None, **options: Any) -> Any:
    return load(None, network, tensors=tensors, config=config, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def first() -> Parts:
    return parts(seed=1)


@pytest.fixture(scope="module")
def second() -> Parts:
    return parts(seed=2, r=8)


def test_the_same_as_from_a_folder(first: Parts, second: Parts, tmp_path: Path) -> None:
    folders = [made.write(tmp_path / str(i)) for i, made in enumerate((first, second))]
    expected = load(folders[0])
    expected.load_adapter(folders[1], "second")
    model = from_memory(first.tensors, config_of(first))
    result = model.load_adapter(None, "second", tensors=second.tensors, config=config_of(second))
    assert result.missing_keys == result.unexpected_keys == []
    assert model.peft_config["second"].r == 8
    for name in ("default", "second"):
        model.set_adapter(name)
        expected.set_adapter(name)
        assert torch.equal(output(model), output(expected))
        assert adapter_tensors(model, name).keys() == adapter_tensors(expected, name).keys()
    assert model.load_report.placed == 8


def test_nothing_is_shared_with_the_giver(first: Parts) -> None:
    """The dict, its tensors and the config may be changed, and the trainer's own tensors are left as they are."""
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in first.tensors.items()}
    config, kept = config_of(first), dict(tensors)
    before = copy.deepcopy(config)
    model = from_memory(tensors, config)
    expected = output(model)
    assert config == before
    assert list(tensors) == list(kept)
    assert all(tensors[n] is kept[n] and kept[n].requires_grad and kept[n].is_leaf for n in kept)
    with torch.no_grad():
        for tensor in kept.values():
            tensor.zero_()
    tensors.clear()
    config.lora_alpha = 1000  # type: ignore[attr-defined]
    assert torch.equal(output(model), expected)


def test_tensors_of_any_layout_dtype_and_mode(first: Parts) -> None:
    """Transposed, cut out of a larger one, made in inference mode, in half precision: loaded as their contiguous values."""
    with torch.inference_mode():
        odd = {n: torch.stack((t, t + 1)).half()[0].T.contiguous().T for n, t in first.tensors.items()}
    model = from_memory(odd, config_of(first), is_trainable=True)
    plain = from_memory({n: t.half().float() for n, t in first.tensors.items()}, config_of(first))
    assert torch.equal(output(model), output(plain))
    for name, tensor in adapter_tensors(model).items():
        assert tensor.is_contiguous(), name
        assert tensor.dtype == torch.float32
        assert tensor.requires_grad
    model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()


def test_new_weights_over_those_of_an_adapter(first: Parts) -> None:
    """As a trainer sends them, step after step: the tensors stay the same objects; even its own live ones may be given."""
    model = from_memory(first.tensors, config_of(first), is_trainable=True)
    objects = {name: id(tensor) for name, tensor in adapter_tensors(model).items()}
    newer = parts(seed=3)
    model.load_adapter(None, "default", is_trainable=True, tensors=newer.tensors)
    assert torch.equal(output(model), output(from_memory(newer.tensors, config_of(newer))))
    expected = output(model)
    live = splice.get_peft_model_state_dict(model)
    model.load_adapter(None, "default", is_trainable=True, tensors=live)
    assert torch.equal(output(model), expected)
    assert {name: id(tensor) for name, tensor in adapter_tensors(model).items()} == objects
    with pytest.raises(ValueError, match="'default' is there already and keeps its config"):
        model.load_adapter(None, "default", tensors=newer.tensors, config=config_of(newer))


def test_what_does_not_fit_is_refused_as_from_a_folder(first: Parts) -> None:
    config, network = config_of(first), llama()
    names = list(first.tensors)
    lacking = {n: t for n, t in first.tensors.items() if n != names[0]}
    extra = {**first.tensors, "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight": torch.zeros(4, 16)}
    wider = {**first.tensors, names[0]: torch.zeros(4, 17)}
    for tensors, message in ((lacking, "missing"), (extra, "unexpected"), (wider, r"\(4,17\)")):
        with unchanged(network), pytest.raises(splice.AdapterMismatchError, match=message) as caught:
            from_memory(tensors, config, network)
        assert "the adapter at `tensors`" in str(caught.value)
    model = from_memory(first.tensors, config)
    with unchanged(model), pytest.raises(splice.AdapterMismatchError, match="missing"):
        model.load_adapter(None, "more", tensors=lacking, config=config)


def test_arguments_that_make_no_checkpoint(first: Parts, tmp_path: Path) -> None:
    config, network = config_of(first), llama()
    name, tensor = next(iter(first.tensors.items()))
    on_meta = {**first.tensors, name: tensor.to("meta")}
    for given, message in (
        ({}, "nothing to load: pass `model_id`"),
        ({"tensors": first.tensors}, "need their config as a PeftConfig, got NoneType"),
        ({"tensors": first.tensors, "config": first.config}, "need their config as a PeftConfig, got dict"),
        ({"tensors": first.tensors, "config": config, "model_id": tmp_path}, "not both"),
        ({"tensors": list(first.tensors), "config": config}, "must be a dict from names to tensors, got list"),
        ({"tensors": {**first.tensors, name: [1.0]}, "config": config}, f"{name}': list"),
        ({"tensors": on_meta, "config": config}, f"{name}' of `tensors` is on the meta device"),
        ({"tensors": {**first.tensors, name: tensor.to_sparse()}, "config": config}, "make it dense"),
    ):
        with unchanged(network), pytest.raises(ValueError, match=message):
            splice.PeftModel.from_pretrained(network, **given)  # type: ignore[arg-type]


def test_names_are_mapped(first: Parts) -> None:
    elsewhere = {n.replace("self_attn", "attention"): t for n, t in first.tensors.items()}
    model = from_memory(elsewhere, config_of(first), key_mapping={"attention": "self_attn"})
    assert torch.equal(output(model), output(from_memory(first.tensors, config_of(first))))
