"""Transforms of inputs, outputs and weights: what is particular to HRA, MiSS, C3A, GLoRA, BEFT and RoAd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import splice
from tests import bases
from tests.bases import Base, run
from tests.comparing import assert_close, differ

BASE = bases.LINEAR


def fields(peft_type: str, **changes: Any) -> dict[str, Any]:
    return {"peft_type": peft_type, "target_modules": ["first", "second"], **changes}


# -- several transforms of one weight


WEIGHTS = [
    (bases.CONV2D, fields("HRA", r=2)),
    (bases.CIRCULAR, fields("HRA", r=2)),
    (bases.UNEVEN, fields("BOFT", boft_block_size=3)),
    (bases.DILATED, fields("BOFT", boft_block_size=3)),
    (BASE, fields("MISS", r=2, init_weights="bat")),
]


@pytest.mark.parametrize(("base", "config"), WEIGHTS, ids=str)
def test_several_transforms_of_a_weight_are_what_they_are_merged(
    base: Base, config: Any, shared_checkpoint: Any
) -> None:
    """Whatever the convolution's padding and dilation; the second beside the first is not the second alone."""
    model: Any = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, config))
    model.load_adapter(shared_checkpoint(base, config, seed=1), "second")
    outputs = {}
    for names in (["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(names)
        outputs[names[0]] = run(model, base.inputs(3))
        model.merge_adapter()
        assert_close(run(model, base.inputs(3)), outputs[names[0]], factor=5)
        model.unmerge_adapter()
    assert differ(outputs["default"], outputs["second"])
    # One merged and the other not.
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter(adapter_names=["default"])
    assert_close(run(model, base.inputs(3)), outputs["default"], factor=5)


@pytest.mark.parametrize(
    ("base", "message"),
    [(bases.SAME, r"kernel that is no square \(here \(1, 3\)"), (bases.GROUPED, "groups .here 2")],
    ids=str,
)
@pytest.mark.parametrize("peft_type", ["HRA", "BOFT", "OFT"])
def test_convolutions_that_are_refused(peft_type: str, base: Base, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        splice.get_peft_model(base.build(), splice.get_peft_config(fields(peft_type)))


def test_equal_pairs_of_vectors_cannot_be_made_orthogonal(shared_checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="Set init_weights=False"):
        splice.get_peft_model(BASE.build(), splice.HRAConfig(target_modules=["first"], r=2, apply_GS=True))
    config = fields("HRA", r=2, apply_GS=True)  # once trained they are equal no more
    assert (
        run(splice.PeftModel.from_pretrained(BASE.build(), shared_checkpoint(BASE, config)), BASE.inputs(2))
        .isfinite()
        .all()
    )


# -- MiSS


@pytest.mark.parametrize("variant", [True, "bat"])
def test_bone_is_read_as_miss(variant: Any, checkpoint: Any, tmp_path: Path) -> None:
    folder: Path = checkpoint(BASE, fields("MISS", r=2, init_weights=variant))
    expected = run(splice.PeftModel.from_pretrained(BASE.build(), folder), BASE.inputs(2))
    config = json.loads((folder / "adapter_config.json").read_text())
    for name in ("miss_dropout", "mini_r"):
        del config[name]
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "BONE"}))
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(".miss_", ".bone_"): tensor for name, tensor in load_file(file).items()}, file)
    model: Any = splice.PeftModel.from_pretrained(BASE.build(), folder)
    assert torch.equal(run(model, BASE.inputs(2)), expected)
    assert "read as MiSS" in str(model.load_report)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["peft_type"] == "MISS"
    assert all(name.endswith("miss_block") for name in load_file(tmp_path / "again" / "adapter_model.safetensors"))


def test_variants_of_miss_stand_beside_each_other(shared_checkpoint: Any) -> None:
    model: Any = splice.PeftModel.from_pretrained(BASE.build(), shared_checkpoint(BASE, fields("MISS", r=2)))
    alone = run(model, BASE.inputs(2))
    for number, init in enumerate(("mini", "bat")):
        model.load_adapter(shared_checkpoint(BASE, fields("MISS", r=2, init_weights=init), seed=number + 1), init)
    assert torch.equal(run(model, BASE.inputs(2)), alone)
    model.base_model.set_adapter(["default", "mini", "bat"])
    together = run(model, BASE.inputs(2))
    model.merge_adapter()
    assert_close(run(model, BASE.inputs(2)), together, factor=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 7}, "first: `r` is 7, and the layer has 6 inputs"),
        ({"r": 2, "init_weights": "mini", "mini_r": 3}, "`mini_r` is 3, which divides not the layer's 8 outputs"),
        ({"r": 4, "init_weights": "bat"}, "6 inputs and 8 outputs, and init_weights='bat' needs both"),
        ({"r": 2, "init_weights": "ball"}, "Unknown init_weights: 'ball'"),
    ],
)
def test_shards_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        splice.get_peft_model(BASE.build(), splice.get_peft_config(fields("MISS", **changes)))


# -- C3A, GLoRA, BEFT, RoAd


def test_several_circular_updates_add_up(shared_checkpoint: Any) -> None:
    """The reference gives the second one the first one's output."""
    model: Any = splice.PeftModel.from_pretrained(BASE.build(), shared_checkpoint(BASE, fields("C3A", block_size=2)))
    model.load_adapter(shared_checkpoint(BASE, fields("C3A", block_size=1), seed=1), "second")
    layer, x = model.get_base_model().first, torch.randn(3, 6)
    model.base_model.set_adapter(["default", "second"])
    deltas = sum(layer.get_delta_weight(name) for name in ("default", "second"))
    assert_close(layer(x).detach(), nn.functional.linear(x, layer.weight + deltas, layer.bias).detach())


def test_a_block_size_that_divides_not() -> None:
    config = splice.C3AConfig(target_modules=["first"], block_size=4)
    with pytest.raises(ValueError, match="first: .* 4 divides not its 6 inputs"):
        splice.get_peft_model(BASE.build(), config)


def test_a_bias_that_is_trained_beside_paths_for_it(shared_checkpoint: Any) -> None:
    """D multiplies the bias that the adapter trains, and each row has its own."""
    config = fields("GLORA", r=2, bias="glora_only")
    model: Any = splice.PeftModel.from_pretrained(BASE.build(), shared_checkpoint(BASE, config))
    model.load_adapter(shared_checkpoint(BASE, fields("GLORA", r=1), seed=1), "second")
    rows = run(model, BASE.inputs(2), adapter_names=["second", "default"])
    for row, name in enumerate(["second", "default"]):
        model.set_adapter(name)
        assert_close(rows[row], run(model, BASE.inputs(2))[row])


def test_a_bias_on_a_layer_that_has_none(shared_checkpoint: Any) -> None:
    base = bases.NO_BIAS
    model: Any = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, fields("BEFT")))
    layer, x = model.get_base_model().first, torch.randn(2, 6)
    assert_close(layer(x).detach(), (x @ layer.weight.T + layer.beft_bias["default"]).detach())
    with pytest.raises(RuntimeError, match="first: adapter 'default' changes the bias, and the base layer has none"):
        model.merge_adapter()
    assert not model.get_base_model().first.merged


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 6}, r"first: the out_features of the base layer \(8\) must be divisible by `group_size` \(6\)"),
        ({"group_size": 3}, "must be divisible by 2"),
        ({"variant": "road_3"}, "Invalid variant 'road_3'"),
    ],
)
def test_groups_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        splice.get_peft_model(BASE.build(), splice.get_peft_config(fields("ROAD", **changes)))
