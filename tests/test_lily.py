"""What is peculiar to Lily: which layers share what, and that a token's update depends on its batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import splice
from splice.methods.lily import LilyConfig
from tests.comparing import run


class Stack(nn.Module):
    """Four layers of one shape, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.out_q = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.q:
            x = layer(x)
        found: torch.Tensor = self.out_q(x)
        return found


TARGETS = {"target_modules": r"q\.\d|out_q", "init_weights": False}


def made(**fields: Any) -> Any:
    torch.manual_seed(0)
    return splice.get_peft_model(Stack(), LilyConfig(**{"r": 2, **TARGETS, **fields})).eval()


def owners(model: Any, suffix: str, name: str = "default") -> list[int]:
    """For each layer, which of them in turn has the tensor first."""
    tensors = [layer.tensor(suffix) for layer in model.base_model.placed[name].values()]
    return [next(i for i, other in enumerate(tensors) if other is tensor) for tensor in tensors]


def test_known_values() -> None:
    model = splice.get_peft_model(nn.Sequential(nn.Linear(2, 2)), LilyConfig(r=1, target_modules=["0"]))
    layer = model.base_model.placed["default"]["0"]
    values = {"A": [[0.1, 0.2]], "B": [[0.1, 0.2], [0.3, 0.4]], "router": [[0.1], [0.2]]}
    with torch.no_grad():
        for name, value in values.items():
            layer.tensor(f"lily_{name}.weight").copy_(torch.tensor(value))
        assert torch.allclose(layer.delta(torch.ones(1, 2)), torch.tensor([[0.06045, 0.09045]]), atol=1e-5)


@pytest.mark.parametrize("name", ["default", "second"])
def test_who_shares_what(name: str) -> None:
    """Also in adapters that come later, whose layers the reference lets have their own."""
    model = made(stride_A=3)
    model.add_adapter("second", LilyConfig(r=2, stride_A=3, **TARGETS))
    assert owners(model, "lily_A.weight", name) == [0, 0, 0, 3, 4]
    assert owners(model, "lily_B.weight", name) == [0, 0, 0, 0, 4]
    assert owners(model, "lily_router.weight", name) == [0, 1, 2, 3, 4]


def test_layers_that_different_ends_name_are_of_different_kinds() -> None:
    model = made(target_modules=["q.0", "q.1", "q.2"])
    assert owners(model, "lily_B.weight") == [0, 1, 2]


def test_a_row_depends_on_the_others_of_its_batch() -> None:
    model = made(scaling=5.0)
    x = torch.randn(4, 3, 6)
    whole, first = run(model, {"x": x}), run(model, {"x": x[:1]})
    assert not torch.allclose(whole[:1], first, atol=1e-4)


def test_it_is_no_change_of_the_weight() -> None:
    model = made()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=r"q\.0: adapter 'default' cannot be merged"):
            merge()


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    """The reference takes the last one for all layers."""
    model = made()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert len(tensors) == 15  # each layer has all of its own, shared or not
    tensors["base_model.model.q.2.lily_B.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        splice.AdapterMismatchError, match=r"different tensors for base_model.model.q.2.lily_B.weight and"
    ):
        splice.PeftModel.from_pretrained(Stack(), tmp_path)


@pytest.mark.parametrize("fields", [{"r": 0}, {"stride_A": 0}, {"num_B": 1}], ids=lambda fields: next(iter(fields)))
def test_a_config_without_meaning_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        made(**fields)
