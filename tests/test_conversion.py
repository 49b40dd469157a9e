"""Adapters of other methods as LoRA."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from splice.kinds.registry import all_methods
from tests import bases
from tests.bases import Base, run
from tests.comparing import assert_close

TARGETS = {"target_modules": ["first", "second"]}
# Methods that add updates to weights. What the reference does not convert is converted all the same.
ADDING: dict[str, dict[str, Any]] = {
    "LOHA": {"r": 2, "init_weights": False},
    "LOKR": {"r": 2, "init_weights": False},
    "VERA": {"r": 4},
    "FOURIERFT": {"n_frequency": 10, "init_weights": False},
    "LORA": {"r": 2, "init_lora_weights": False},
    "ADALORA": {"init_r": 3, "total_step": 10},
}
IN_REFERENCE = ("LOHA", "LOKR", "VERA", "FOURIERFT", "LORA")
FULL = 4  # the smaller side of `second`; of `first` it is 6


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapted(library: Any, method: str, base: Base = bases.LINEAR, **fields: Any) -> Any:
    torch.manual_seed(4)
    config = library.get_peft_config({"peft_type": method, **TARGETS, **ADDING.get(method, {}), **fields})
    model = library.get_peft_model(base.build(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def products(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    paths = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith("lora_A.weight")]
    return {path: tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"] for path in paths}


@pytest.mark.parametrize("method", ADDING)
@pytest.mark.parametrize("base", [bases.LINEAR, bases.TRANSPOSED], ids=str)
def test_at_full_rank_it_computes_the_same(base: Base, method: str, tmp_path: Path) -> None:
    if base is bases.TRANSPOSED and method in ("LOHA", "LOKR"):
        pytest.skip("these are on no such layers")
    model = adapted(splice, method, base)
    expected = run(model, base.inputs(3))
    assert model.supports_lora_conversion()
    splice.save_as_lora(tmp_path, model, 1.0)
    assert torch.equal(run(model, base.inputs(3)), expected)
    assert (expected - run(base.build(), base.inputs(3))).abs().max() > 1e-3
    for library in (splice, peft):
        again = library.PeftModel.from_pretrained(base.build(), str(tmp_path))
        assert_close(run(again, base.inputs(3)), expected, factor=10)


@pytest.mark.parametrize("method", IN_REFERENCE)
@pytest.mark.parametrize("rank", [2, 0.7])
def test_it_is_what_the_reference_makes(method: str, rank: float, tmp_path: Path) -> None:
    base = bases.LINEAR
    adapted(splice, method).save_pretrained(tmp_path)
    models = [lib.PeftModel.from_pretrained(base.build(), str(tmp_path)) for lib in (peft, splice)]
    (config, expected), (made, tensors) = (
        library.convert_to_lora(model, rank) for library, model in zip((peft, splice), models)
    )
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in expected.items()}
    for path, product in products(expected).items():
        assert_close(products(tensors)[path], product, factor=10)
    # The class of the base stays known: the reference forgets it.
    theirs, ours = (
        json.loads(json.dumps(c.to_dict() | {"auto_mapping": None}, default=sorted)) for c in (config, made)
    )
    assert ours == theirs


def test_every_method_says_whether_it_can() -> None:
    """All that only add can; the others are named here."""
    others = {
        "IA3": {"feedforward_modules": []},
        "OFT": {"oft_block_size": 2},
        "LN_TUNING": {},
        "TRAINABLE_TOKENS": {"target_modules": ["head"], "token_indices": [1]},
    }
    prompts = {"PROMPT_TUNING", "PREFIX_TUNING"}
    known = {method.name.value for method in all_methods().values()}
    assert known >= {*ADDING, *others, *prompts}
    for method, fields in others.items():
        model = adapted(splice, method, **fields)
        assert not model.supports_lora_conversion(), method
        with pytest.raises(TypeError, match="LoRA conversion"):
            splice.convert_to_lora(model, 2)
    config = splice.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompt: Any = splice.get_peft_model(bases.LLAMA.build(), config)
    assert not prompt.supports_lora_conversion()
    with pytest.raises(TypeError, match="LoRA conversion"):
        splice.convert_to_lora(prompt, 2)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"use_dora": True}, TypeError, "does more than to add"),
        ({"lora_bias": True}, TypeError, "adds to the bias"),
        ({"bias": "lora_only"}, ValueError, "bias=lora_only, this is not supported"),
    ],
    ids=str,
)
def test_lora_that_is_no_plain_lora_is_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        splice.convert_to_lora(adapted(splice, "LORA", **fields), 2)


@pytest.mark.parametrize("fields", [{"init_lora_weights": "pissa"}, {"kasa_config": {}}], ids=str)
def test_what_was_taken_out_of_the_base_is_converted_with_it(fields: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(splice, "LORA", **fields)
    splice.save_as_lora(tmp_path, model, 1.0)
    again = splice.PeftModel.from_pretrained(bases.LINEAR.build(), tmp_path)
    inputs = bases.LINEAR.inputs(3)
    assert_close(run(again, inputs), run(model, inputs), factor=10)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank of 0 doesn't make sense"),
        (-1, "rank of -1 doesn't make sense"),
        (1.5, "between 0 and 1"),
        (5, r"The chosen rank 5 is larger than the weight shape \(4\) of second"),
    ],
)
def test_ranks_that_cannot_be(rank: float, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        splice.save_as_lora(tmp_path / "out", adapted(splice, "LOHA"), rank)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_named() -> None:
    model = adapted(splice, "LOHA")
    for call in (lambda: model.supports_lora_conversion("no"), lambda: splice.convert_to_lora(model, 2, "no")):
        with pytest.raises(ValueError, match="'no' not found"):
            call()
    with pytest.raises(TypeError, match="Could not detect any layer"):
        splice.convert_to_lora(bases.LINEAR.build(), 2)


def test_a_network_without_its_peft_model() -> None:
    network = bases.LINEAR.build()
    config = splice.LoHaConfig(r=2, init_weights=False, **TARGETS)
    splice.inject_adapter_in_model(config, network)
    made, tensors = splice.convert_to_lora(network, 2)
    assert list(tensors) == [f"{path}.lora_{side}.weight" for path in ("first", "second") for side in "AB"]
    assert made.target_modules == {"first", "second"}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ".*(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_the_same_layers_are_selected(fields: dict[str, Any], tmp_path: Path) -> None:
    base = bases.LLAMA
    model = adapted(splice, "LOHA", base, task_type="CAUSAL_LM", **fields)
    splice.save_as_lora(tmp_path, model, 1.0)
    expected = run(model, base.inputs(2))
    for library in (splice, peft):
        again = library.PeftModel.from_pretrained(base.build(), str(tmp_path))
        assert_close(run(again, base.inputs(2)), expected, factor=10)
    assert isinstance(again, peft.PeftModelForCausalLM)
