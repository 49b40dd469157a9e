"""What is peculiar to TinyLoRA: groups of layers with one vector, and projections drawn by a layer's position."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from splice.methods.tinylora import TinyLoraConfig, group_count, group_of
from tests import bases
from tests.comparing import differ, run


@pytest.mark.parametrize(
    ("tying", "groups"),
    [(0.0, [0, 1, 2, 3, 4, 5, 6]), (0.3, [0, 1, 2, 3, 4, 4, 4]), (0.5, [0, 1, 2, 3, 3, 3, 3]), (0.8, [0] * 7)],
)
def test_which_layers_have_one_vector(tying: float, groups: list[int]) -> None:
    assert [group_of(position, 7, tying) for position in range(7)] == groups
    assert max(groups) < group_count(7, tying)


class Two(nn.Module):
    """Two layers and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.e = nn.Linear(6, 8), nn.Linear(8, 6), nn.Embedding(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.lin1(self.lin0(self.e(x)))
        return found


def built(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Two().to(dtype)


def test_known_projections() -> None:
    model = splice.get_peft_model(built(), TinyLoraConfig(r=2, u=5, target_modules=["lin0", "lin1"]))
    known = {
        "lin0": [[1.3625349, 1.0516686], [0.6369032, -1.4888282]],
        "lin1": [[-0.0117405, -0.3300739], [1.4784878, 0.4348020]],
    }
    for path, values in known.items():
        projection = model.base_model.placed["default"][path].tensor("tinylora_P")
        assert torch.allclose(projection[0], torch.tensor(values), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save_projection", [True, False])
def test_a_new_adapter_is_the_references(dtype: torch.dtype, save_projection: bool) -> None:
    """What is drawn to the bit; what is worked out up to rounding."""
    fields: dict[str, Any] = {
        "r": 2,
        "u": 5,
        "target_modules": ["lin0", "lin1", "e"],
        "save_projection": save_projection,
    }
    ours = splice.get_peft_model(built(dtype), TinyLoraConfig(**fields))
    with pytest.warns(UserWarning, match="projection") if not save_projection else nullcontext():
        theirs = peft.get_peft_model(built(dtype), peft.TinyLoraConfig(**fields))
    for path in fields["target_modules"]:
        mine, other = ours.get_submodule(f"base_model.model.{path}"), theirs.get_submodule(f"base_model.model.{path}")
        assert torch.equal(mine.tinylora_P["default"], other.tinylora_P["default"])
        for name in ("tinylora_A", "tinylora_B"):
            one, two = getattr(mine, name)["default"], getattr(other, name)["default"]
            assert one.dtype == two.dtype
            assert torch.allclose(one, two, atol=1e-2 if dtype is torch.bfloat16 else 1e-5)
    assert not any(bool(v.any()) for v in ours.base_model.tinylora_v["default"].parameters())


def test_an_adapter_that_comes_second_keeps_its_own_positions(tmp_path: Path) -> None:
    """The reference takes those of the first one's layers, and computes something else."""
    fields: dict[str, Any] = {"u": 5, "save_projection": False, "init_weights": "uniform", "init_v_bound": 1.0}
    alone = splice.get_peft_model(built(), TinyLoraConfig(target_modules=["lin1"], **fields)).eval()
    inputs = {"x": torch.arange(6)[None]}
    expected = run(alone, inputs)
    assert differ(expected, run(built().eval(), inputs))
    alone.save_pretrained(tmp_path)
    model = splice.get_peft_model(built(), TinyLoraConfig(target_modules=["lin0", "lin1"], **fields)).eval()
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(run(model, inputs), expected)


def test_a_load_works_out_nothing_of_the_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The singular vectors are in the file: their signs are another machine's."""
    config = TinyLoraConfig(target_modules=["first", "second"], save_projection=False, init_weights="uniform")
    model = splice.get_peft_model(bases.LINEAR.build(), config).eval()
    model.save_pretrained(tmp_path)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a load decomposes a weight")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    again = splice.PeftModel.from_pretrained(bases.LINEAR.build(), tmp_path)
    inputs = bases.LINEAR.inputs(2)
    assert torch.equal(run(again, inputs), run(model, inputs))


@pytest.mark.parametrize("fields", [{"r": 0}, {"u": 0}, {"weight_tying": 1.5}], ids=lambda fields: next(iter(fields)))
def test_a_config_without_meaning_is_refused(fields: dict[str, Any]) -> None:
    for config_class in (TinyLoraConfig, peft.TinyLoraConfig):
        with pytest.raises(ValueError, match=next(iter(fields))):
            config_class(**fields)
