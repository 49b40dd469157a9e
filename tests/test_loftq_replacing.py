"""LoRA that starts at what quantising the base has lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import splice
from splice.base.weight_access import dense_weight
from tests import bases
from tests.quantised import WAYS, WIDE, Way

CONFIG = splice.LoraConfig(r=3, lora_alpha=6, target_modules=["first", "second"])
ways = pytest.mark.parametrize("way", WAYS, ids=str)


def written(folder: Path, shards: bool = False) -> Path:
    tensors = {name: tensor.contiguous() for name, tensor in WIDE.build().state_dict().items()}
    folder.mkdir(exist_ok=True)
    if not shards:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / files[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def lost(model: Any) -> dict[str, torch.Tensor]:
    """The full weight of each layer, without the weight that the layer computes with."""
    whole, found = WIDE.build(), {}
    for path, layer in model.base_model.placed["default"].items():
        weight = dense_weight(layer.base).float() + layer.scale * (layer.b @ layer.a).float()
        found[path] = (whole.get_submodule(path).weight.float() - weight).detach()
    return found


@pytest.mark.parametrize("shards", [False, True])
@ways
def test_it_comes_nearer_to_the_full_weights(way: Way, shards: bool, tmp_path: Path) -> None:
    model = splice.get_peft_model(way.base(), CONFIG)
    before = lost(model)
    splice.replace_lora_weights_loftq(model, written(tmp_path / "full", shards))
    for path, rest in lost(model).items():
        # As near as any change of rank 3 comes (Eckart and Young, 1936).
        least = torch.linalg.svdvals(before[path])[3:].norm()
        assert before[path].norm() > rest.norm() > 0
        torch.testing.assert_close(rest.norm(), least, rtol=1e-3, atol=0)


@ways
def test_a_callback_may_take_a_layer_back(way: Way, tmp_path: Path) -> None:
    model, asked = splice.get_peft_model(way.base(), CONFIG), []

    def keep(given: Any, path: str) -> bool:
        assert given is model
        asked.append(path)
        return path == "second"

    before = lost(model)
    splice.replace_lora_weights_loftq(model, written(tmp_path / "full") / "model.safetensors", callback=keep)
    after = lost(model)
    assert asked == ["first", "second"]
    assert torch.equal(after["first"], before["first"]) and after["second"].norm() < before["second"].norm()


@pytest.mark.skipif(not WAYS, reason="no library that quantises is here")
def test_what_cannot_be_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = splice.get_peft_model(WAYS[0].base(), CONFIG)
    before = {name: tensor.clone() for name, tensor in splice.get_peft_model_state_dict(model).items()}
    folder = written(tmp_path / "full")
    with pytest.raises(ValueError, match="Adapter other not found"):
        splice.replace_lora_weights_loftq(model, folder, "other")
    with pytest.raises(FileNotFoundError, match="pass its full weights as `model_path`"):
        splice.replace_lora_weights_loftq(model)
    save_file({"first.weight": WIDE.build().first.weight.contiguous()}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"second: the full weights have no 'second\.weight'"):
        splice.replace_lora_weights_loftq(model, tmp_path / "part.safetensors")
    save_file({f"{n}.weight": torch.ones(2, 3) for n in ("first", "second")}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"first: its full weight is \[2, 3\]"):
        splice.replace_lora_weights_loftq(model, tmp_path / "other.safetensors")
    after = splice.get_peft_model_state_dict(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    plain = splice.get_peft_model(bases.LINEAR.build(), CONFIG)
    with pytest.raises(ValueError, match="No LoRA layer of adapter 'default' is on a quantised weight"):
        splice.replace_lora_weights_loftq(plain, folder)
