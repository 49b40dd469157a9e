"""Modules whose `__new__` wants arguments: what copies them cannot ask for such an object again."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

import splice


class Sized(nn.Linear):
    """It remembers something from the time before `__init__`."""

    sizes: tuple[int, int]

    def __new__(cls, size_in: int, size_out: int) -> Any:
        made = super().__new__(cls)
        made.__dict__["sizes"] = (size_in, size_out)
        return made

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__(size_in, size_out)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.sized = nn.Linear(3, 3), Sized(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.sized(self.first(x))
        return out


X = torch.ones(2, 3)


def test_saved_whole(tmp_path: Path) -> None:
    model = splice.get_peft_model(Net(), splice.LoraConfig(r=1, target_modules=["first"], modules_to_save=["sized"]))
    nn.init.ones_(model.get_base_model().sized.modules_to_save["default"].weight)
    assert model.get_base_model().sized.modules_to_save["default"].sizes == (3, 3)
    expected = model.eval()(X)
    model.save_pretrained(tmp_path)
    assert torch.equal(splice.PeftModel.from_pretrained(Net(), tmp_path)(X), expected)
    assert torch.equal(model.merge_and_unload()(X), expected)


def test_copied_and_pickled_while_adapted() -> None:
    config = splice.LoraConfig(r=1, target_modules=["sized"], init_lora_weights=False)
    model = splice.get_peft_model(Net(), config).eval()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(X), model(X))
        assert type(again.unload().sized) is Sized and again.get_base_model().sized.sizes == (3, 3)
