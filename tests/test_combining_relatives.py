"""`add_weighted_adapter` of LoRA's relatives, starts and options: a combination computes the weighted sum, or is refused.

The reference combines A and B alone: biases, magnitudes and what was taken out of the base are lost there.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import splice
from splice.checkpoint.types import PeftType
from splice.methods.lora.combining import TYPES
from splice.methods.lora.config import VARIANTS as FIELDS
from tests import bases
from tests.bases import Base, run
from tests.comparing import Snapshot, assert_close, differ, trainable_names
from tests.samples import SAMPLES
from tests.test_lora_inits import TAKING
from tests.test_lora_variants import VARIANTS, inputs_of

# Options of LoRA that change what an adapter computes -> the base to try them on.
OPTIONS: dict[str, tuple[dict[str, Any], Base]] = {
    **{name: (fields, on[-1]) for name, (fields, on) in VARIANTS.items()},
    **{f"{name} of the samples": (fields, bases.LINEAR) for name, fields in SAMPLES[PeftType.LORA].options.items()},
    **{name: (dict(fields), bases.LINEAR) for name, fields in TAKING.items()},
    "pissa over several layers": ({"init_lora_weights": "pissa"}, bases.LLAMA),
    "pissa with niter": ({"init_lora_weights": "pissa_niter_8"}, bases.LINEAR),
    "mica": ({"init_lora_weights": "mica"}, bases.LINEAR),
    "mica on embeddings": ({"init_lora_weights": "mica"}, bases.EMBEDDING),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, bases.LINEAR),
    "dora": ({"use_dora": True}, bases.LINEAR),
    "dora on embeddings": ({"use_dora": True}, bases.EMBEDDING),
    "a bias on convolutions": ({"lora_bias": True}, bases.CONV2D),
    "groups": ({"r": 4}, bases.GROUPED),
    "rank above r": ({"r": 2, "rank_pattern": {"first": 3}}, bases.LINEAR),
    "attention": ({"target_modules": ["self_attn"]}, bases.ENCODER),
}
# They have no sum, so the only combination is one alone with weight 1.
ALONE = ("loftq", "dora", "dora on embeddings", "pissa-dora")
# Only one adapter of a model can train biases of the base.
BIASES = ("bias_all of the samples", "bias_of_targets of the samples")
SUMS = [name for name in OPTIONS if name not in (*ALONE, *BIASES)]


def config(name: str, **changes: Any) -> dict[str, Any]:
    fields, base = OPTIONS[name]
    named = {"target_modules": [t for t in base.targets if not t.startswith("down")], "task_type": base.task}
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **named, **fields, **changes}


def written(fields: dict[str, Any], base: Base, shared_checkpoint: Any, seed: int = 0) -> Path:
    """The reference makes no LoftQ here, but its files are those of plain LoRA."""
    changed = {key: value for key, value in fields.items() if value == "loftq" or key == "loftq_config"}
    folder: Path = shared_checkpoint(base, {k: v for k, v in fields.items() if k not in changed}, seed=seed)
    if not changed:
        return folder
    copy = folder.with_name(f"{folder.name}-loftq")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    return copy


def loaded(name: str, shared_checkpoint: Any, *others: dict[str, Any]) -> Any:
    """A model with the adapter "default", and others beside it."""
    base = OPTIONS[name][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = splice.PeftModel.from_pretrained(base.build(), written(config(name), base, shared_checkpoint))
        for number, fields in enumerate(others):
            folder = written({**config(name), **fields}, base, shared_checkpoint, number + 1)
            model.load_adapter(folder, adapter_name=f"other{number}")
    return model


def output(model: Any, name: str, *adapters: str) -> torch.Tensor:
    if adapters:
        model.base_model.set_adapter(list(adapters), inference_mode=True)
    return run(model, inputs_of(OPTIONS[name][1]))


def test_every_relative_is_tried() -> None:
    tried = {field for fields, _ in OPTIONS.values() for field in fields}
    # A router adds nothing of its own, so that there is nothing to combine.
    assert set(FIELDS) <= tried | {"arrow_config"}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in BIASES])
def test_one_adapter_alone_with_weight_1_is_that_adapter(
    name: str, kind: str, shared_checkpoint: Any, tmp_path: Path
) -> None:
    model = loaded(name, shared_checkpoint)
    expected, base = output(model, name), OPTIONS[name][1]
    model.add_weighted_adapter(["default"], [1.0], "combined", combination_type=kind, density=0.5)
    assert_close(output(model, name, "combined"), expected, factor=10)
    if kind != "svd":
        return
    model.save_pretrained(tmp_path, selected_adapters=["combined"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = splice.PeftModel.from_pretrained(base.build(), tmp_path / "combined")
    assert_close(output(again, name), expected, factor=10)
    model.delete_adapter("default")
    assert_close(output(model, name), expected, factor=10)


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("name", SUMS)
def test_the_sum_of_two_is_both_together(name: str, kind: str, shared_checkpoint: Any) -> None:
    """With the weight 1 for both, so that the whole network shows it, beyond the first layer as well."""
    model = loaded(name, shared_checkpoint, {})
    conflicts = "kasa" in name
    weights = [1.0, 0.0] if conflicts else [1.0, 1.0]
    expected = output(model, name, "default") if conflicts else output(model, name, "default", "other0")
    model.add_weighted_adapter(["default", "other0"], weights, "combined", combination_type=kind, svd_rank=8)
    assert_close(output(model, name, "combined"), expected, factor=20)


@pytest.mark.parametrize("name", [n for n in SUMS if OPTIONS[n][1] in (bases.LINEAR, bases.CONV2D, bases.GROUPED)])
def test_the_weights_count_for_all_that_an_adapter_does(name: str, shared_checkpoint: Any) -> None:
    """On a layer by itself: base + sum w_i (adapted_i - base)."""
    model = loaded(name, shared_checkpoint, {"lora_alpha": 3})
    model.add_weighted_adapter(["default", "other0"], [0.7, -1.5], "combined", combination_type="cat")
    layer, x = model.get_base_model().first, OPTIONS[name][1].inputs(3)["x"]
    found = {}
    with torch.no_grad():
        for adapter in ("default", "other0", "combined"):
            model.set_adapter(adapter, inference_mode=True)
            found[adapter] = layer(x)
        with model.disable_adapter():
            base = layer(x)
    expected = base + 0.7 * (found["default"] - base) - 1.5 * (found["other0"] - base)
    assert_close(found["combined"], expected, factor=20)


def test_relatives_with_one_another(shared_checkpoint: Any) -> None:
    """The first one's relative is not asked of the others."""
    others = ({"init_lora_weights": "pissa"}, {"lora_bias": True}, {"velora_config": {"num_groups": 3}})
    for name in ("kasa", "lora_bias of the samples", "gaussian of the samples"):
        fields = {f: None for f in config("kasa") if f == "kasa_config"}
        model = loaded(
            name, shared_checkpoint, *({**fields, "lora_bias": False, "init_lora_weights": True, **o} for o in others)
        )
        names = ["default", "other0", "other1", "other2"]
        if name == "kasa":
            names.remove("other0")  # both take something out of the weight
        expected = output(model, name, *names)
        model.add_weighted_adapter(names, [1.0] * len(names), "combined", combination_type="cat")
        assert_close(output(model, name, "combined"), expected, factor=20)


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("weights", [[0.5], [1.0, 1.0]], ids=len)
def test_what_has_no_sum_is_refused(name: str, weights: list[float], shared_checkpoint: Any) -> None:
    model = loaded(name, shared_checkpoint, *({} for _ in weights[1:]))
    before, trained = Snapshot.of(model), trainable_names(model)
    with pytest.raises(splice.UnsupportedFeatureError, match="no sum that is an adapter"):
        model.add_weighted_adapter(["default", "other0"][: len(weights)], weights, "combined", combination_type="cat")
    before.assert_same(model)
    assert trainable_names(model) == trained and "combined" not in model.peft_config


@pytest.mark.parametrize("name", BIASES)
def test_trained_biases_are_refused(name: str, shared_checkpoint: Any) -> None:
    """As in the reference where the first adapter has them; it drops those of the others."""
    model = loaded(name, shared_checkpoint, {"bias": "none"})
    for adapters in (["default"], ["other0", "default"]):
        with pytest.raises(ValueError, match="only one adapter of a model can train biases, and 'default' does"):
            model.add_weighted_adapter(adapters, [1.0] * len(adapters), "combined", combination_type="cat")
    assert "combined" not in model.peft_config


@pytest.mark.parametrize("tokens", [None, [7]], ids=str)
def test_adapters_with_other_invocations_are_refused(tokens: list[int] | None, shared_checkpoint: Any) -> None:
    model = loaded("alora", shared_checkpoint, {"alora_invocation_tokens": tokens})
    for adapters in (["default", "other0"], ["other0", "default"]):
        with pytest.raises(ValueError, match="take effect at other tokens"):
            model.add_weighted_adapter(adapters, [1.0, 1.0], "combined", combination_type="cat")
    assert "combined" not in model.peft_config


def test_other_ranks_on_one_layer_are_refused_by_its_name(shared_checkpoint: Any) -> None:
    model = loaded("rank above r", shared_checkpoint, {"rank_pattern": {"second": 3}})
    with pytest.raises(ValueError, match="^first: All adapters must have the same r value"):
        model.add_weighted_adapter(["default", "other0"], [1.0, 1.0], "combined", combination_type="linear")


def test_parameters_are_refused(shared_checkpoint: Any, tmp_path: Path) -> None:
    base = bases.EXPERTS
    fields = {"peft_type": "LORA", "r": 2, "target_modules": [], "target_parameters": ["up"]}
    model = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, fields))
    for kind in ("cat", "linear"):
        with pytest.raises(ValueError, match="does not support targeting nn.Parameter"):
            model.add_weighted_adapter(["default"], [1.0], "combined", combination_type=kind)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"exclude_modules": ["second"]}, {}),
        ({}, {"exclude_modules": ["first"]}),
        ({"target_modules": ["first"]}, {"modules_to_save": ["head"], "target_modules": ["second"]}),
    ],
    ids=str,
)
def test_the_file_of_a_combination_says_all_that_it_is(
    one: dict[str, Any], other: dict[str, Any], shared_checkpoint: Any, tmp_path: Path
) -> None:
    """What one config leaves out, or saves whole, the other need not."""
    base, plain = (
        bases.LINEAR,
        {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": list(bases.LINEAR.targets)},
    )
    model = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, {**plain, **one}))
    model.load_adapter(shared_checkpoint(base, {**plain, **other}, seed=1), "other")
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "combined", combination_type="cat")
    model.set_adapter("combined")
    expected = run(model, base.inputs(3))
    model.save_pretrained(tmp_path, selected_adapters=["combined"])
    again = splice.PeftModel.from_pretrained(base.build(), tmp_path / "combined")
    assert torch.equal(run(again, base.inputs(3)), expected)
    assert differ(expected, run(base.build(), base.inputs(3)))
