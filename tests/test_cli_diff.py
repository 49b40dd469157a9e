"""`splice diff`: what it finds different is what is different, by the matrices themselves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import splice
from splice.cli.opened import open_adapter
from splice.cli.summary import look_into
from splice.cli.updates import effective_rank, singular_values, updates_of
from tests.broken import Parts, parts
from tests.cli import run, run_json

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def update(adapter: Parts, path: str, scale: float) -> torch.Tensor:
    a, b = (adapter.tensors[f"{path}.lora_{x}.weight"].double() for x in "AB")
    return scale * b @ a


def test_the_same_adapter(tmp_path: Path) -> None:
    one, other = parts().write(tmp_path / "one"), parts().write(tmp_path / "other")
    assert run("diff", one, other).out.endswith("the same: 4 layers, every value\n")
    code, told = run_json("diff", one, other)
    assert (code, told["same"]) == (0, True)


def test_a_pickle_and_a_safetensors_file_of_the_same_values_are_the_same(tmp_path: Path) -> None:
    one, other = parts().write(tmp_path / "one"), parts().write(tmp_path / "other", as_bin=True)
    assert run_json("diff", one, other)[0] == 0


def test_the_order_of_targets_is_no_difference(tmp_path: Path) -> None:
    """The reference writes what is a set in memory, in any order."""
    one, other = parts(), parts()
    one.config["target_modules"], other.config["target_modules"] = ["q_proj", "v_proj"], ["v_proj", "q_proj"]
    code, told = run_json("diff", one.write(tmp_path / "one"), other.write(tmp_path / "other"))
    assert (code, told["config"], told["same"]) == (0, {}, True)


def test_how_much_the_updates_differ(tmp_path: Path) -> None:
    """Of other ranks, dtypes and scales too: updates are compared and not tensors."""
    first, second = parts(), parts(seed=1, r=2, lora_alpha=32)
    second.tensors = {name: tensor.bfloat16() for name, tensor in second.tensors.items()}
    code, told = run_json("diff", first.write(tmp_path / "one"), second.write(tmp_path / "other"))
    assert code == 1
    assert told["config"] == {"lora_alpha": [8, 32], "r": [4, 2]}
    assert told["shapes"][f"{FIRST}.lora_A.weight"] == [[4, 16], [2, 16]]
    assert told["dtypes"][f"{FIRST}.lora_A.weight"] == ["F32", "BF16"]
    layer = next(layer for layer in told["layers"] if layer["path"] == FIRST.removeprefix("base_model.model."))
    a, b = update(first, FIRST, 2.0), update(second, FIRST, 16.0)
    assert layer["norms"] == pytest.approx([float(a.norm()), float(b.norm())], rel=1e-5)
    assert layer["cosine"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-5)
    assert layer["largest"] is None


def test_the_largest_difference_of_values(tmp_path: Path) -> None:
    first, second = parts(), parts()
    second.tensors[f"{FIRST}.lora_B.weight"][3, 1] += 0.5
    _, told = run_json("diff", first.write(tmp_path / "one"), second.write(tmp_path / "other"))
    largest = {layer["path"]: layer["largest"] for layer in told["layers"]}
    assert largest.pop(FIRST.removeprefix("base_model.model.")) == pytest.approx(0.5, abs=1e-6)
    assert set(largest.values()) == {0.0}
    ran = run("diff", tmp_path / "one", tmp_path / "other")
    assert ran.code == 1 and ran.out.splitlines()[2].startswith("model.layers.0.self_attn.q_proj"), "it comes first"


def test_tensors_that_one_has_alone(tmp_path: Path) -> None:
    first, second = parts(target_modules=["q_proj"]), parts(target_modules=["q_proj", "v_proj"])
    _, told = run_json("diff", first.write(tmp_path / "one"), second.write(tmp_path / "other"))
    assert told["only_in_one"] == [] and len(told["only_in_other"]) == 4
    assert "4 tensors in the second alone" in run("diff", tmp_path / "one", tmp_path / "other").out


def test_singular_values_without_the_matrix(tmp_path: Path) -> None:
    adapter = parts()
    for found in updates_of(look_into(open_adapter(str(adapter.write(tmp_path))))):
        matrix = update(adapter, f"base_model.model.{found.layer.path}", 2.0)
        expected = torch.linalg.svdvals(matrix)[:4]
        assert torch.allclose(torch.tensor(found.singular_values).double(), expected, rtol=1e-5)
        assert found.norm == pytest.approx(float(matrix.norm()), rel=1e-5)
        assert found.factors is not None
        assert singular_values(found.factors).shape == (4,)


class Net(nn.Module):
    """A linear layer and convolutions, with numbers of channels that split in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 36)
        self.conv = nn.Conv2d(12, 16, 3)
        self.line = nn.Conv1d(12, 16, 3)


OF_LYCORIS = [
    splice.LoHaConfig(r=2, alpha=3, rank_pattern={"fc": 3}, alpha_pattern={"conv": 5}, init_weights=False),
    splice.LoKrConfig(r=2, alpha=3, init_weights=False),
    splice.LoKrConfig(r=1, alpha=3, init_weights=False, decompose_both=True, decompose_factor=4),
]


@pytest.mark.parametrize("config", OF_LYCORIS, ids=["LoHa", "LoKr", "LoKr with both sides decomposed"])
def test_updates_of_lycoris_without_the_matrix(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, config = Net(), copy.deepcopy(config)
    config.target_modules = ["fc", "conv"]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model: Any = splice.get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().state_dict()
    summary = look_into(open_adapter(str(tmp_path)))
    found = {update.layer.path: update for update in updates_of(summary)}
    assert found.keys() == {"fc", "conv"} and summary.problems == ()
    for path, update in found.items():
        change = (merged[f"{path}.weight"] - before[f"{path}.weight"]).flatten(1)
        assert update.factors is not None
        product = torch.from_numpy(update.factors.left @ update.factors.right)
        torch.testing.assert_close(product, change, rtol=1e-4, atol=1e-5)
        assert update.norm == pytest.approx(float(change.norm()), rel=1e-4)
        assert update.layer.rank == config.rank_pattern.get(path, config.r)


@pytest.mark.parametrize(
    "config",
    [
        splice.LoHaConfig(r=2, init_weights=False, use_effective_conv2d=True, target_modules=["conv"]),
        splice.LoHaConfig(r=9, init_weights=False, target_modules=["fc"]),
        splice.LoKrConfig(r=1, init_weights=False, use_effective_conv2d=True, target_modules=["conv"]),
        splice.LoKrConfig(r=9, init_weights=False, target_modules=["line"]),
    ],
    ids=["LoHa with a core", "LoHa of a high rank", "LoKr with a core", "LoKr on a line"],
)
def test_updates_that_are_no_product_have_a_norm_of_tensors(config: Any, tmp_path: Path) -> None:
    splice.get_peft_model(Net(), copy.deepcopy(config)).save_pretrained(tmp_path)
    (found,) = updates_of(look_into(open_adapter(str(tmp_path))))
    tensors = load_file(tmp_path / "adapter_model.safetensors").values()
    assert found.factors is None and found.singular_values == ()
    assert found.norm == pytest.approx(sum(float(tensor.square().sum()) for tensor in tensors) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "rank"), [((1.0, 1.0, 1.0), 3.0), ((5.0, 0.0), 1.0), ((), 0.0), ((0.0,), 0.0), ((float("nan"),), 0.0)]
)
def test_the_effective_rank(values: tuple[float, ...], rank: float) -> None:
    assert effective_rank(values) == pytest.approx(rank)
