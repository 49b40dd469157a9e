"""QA-LoRA, which the reference puts on layers of GPTQ alone; on all others its adapters are read as plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import splice
from splice.methods.lora.qalora import repeated
from tests import bases
from tests.bases import run
from tests.comparing import assert_close

BASE = bases.LINEAR
GROUP = 2


def qalora(**changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["first", "second"], **changes}


class GPTQQuantLinear(nn.Module):
    """What QA-LoRA needs of a layer of GPTQ, whose kernels run on no CPU: its name, its library, its sizes, an output."""

    __module__ = "gptqmodel.nn_modules.qlinear.stand_in"

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.bits, self.group_size = 4, GROUP
        self.register_buffer("values", dense.weight.detach().clone())
        self.register_buffer("bias", dense.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.values, self.bias)


def on_codes() -> Any:
    network = BASE.build()
    network.first, network.second = GPTQQuantLinear(network.first), GPTQQuantLinear(network.second)
    return network


@pytest.fixture
def pair(checkpoint: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A QA-LoRA adapter, and the plain LoRA that computes the same."""
    folder: Path = checkpoint(BASE, qalora())
    plain = load_file(folder / "adapter_model.safetensors")
    means = {name: tensor[:, ::GROUP].clone() if "lora_A" in name else tensor for name, tensor in plain.items()}
    own = tmp_path / "own"
    own.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    config.update(use_qalora=True, qalora_group_size=GROUP)
    (own / "adapter_config.json").write_text(json.dumps(config))
    save_file(means, own / "adapter_model.safetensors")
    as_plain = {name: repeated(tensor, GROUP) if "lora_A" in name else tensor for name, tensor in means.items()}
    save_file(as_plain, folder / "adapter_model.safetensors")
    return own, folder


def test_a_worked_example() -> None:
    network = nn.Sequential(GPTQQuantLinear(nn.Linear(4, 1)))
    config = splice.LoraConfig(r=1, lora_alpha=1, target_modules=["0"], use_qalora=True, qalora_group_size=2)
    model: Any = splice.get_peft_model(network, config)
    layer, x = model.get_base_model()[0], torch.tensor([[1.0, 3.0, 5.0, 7.0]])
    before = layer(x)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_B["default"].weight.fill_(1.0)
    assert_close((layer(x) - before).detach(), torch.tensor([[28.0]]))


def test_on_layers_of_gptq(pair: tuple[Path, Path], tmp_path: Path) -> None:
    expected = run(splice.PeftModel.from_pretrained(BASE.build(), pair[1]), BASE.inputs(3))
    model: Any = splice.PeftModel.from_pretrained(on_codes(), pair[0])
    assert model.get_base_model().first.lora_A["default"].weight.shape == (2, 3)
    assert_close(run(model, BASE.inputs(3)), expected)
    with pytest.raises(NotImplementedError, match="first"):
        model.merge_adapter()
    model.save_pretrained(tmp_path / "again")
    again = splice.PeftModel.from_pretrained(on_codes(), tmp_path / "again")
    assert torch.equal(run(again, BASE.inputs(3)), run(model, BASE.inputs(3)))


def test_on_other_layers_it_is_plain_lora(pair: tuple[Path, Path]) -> None:
    expected = run(splice.PeftModel.from_pretrained(BASE.build(), pair[1]), BASE.inputs(3))
    model: Any = splice.PeftModel.from_pretrained(BASE.build(), pair[0])
    assert_close(run(model, BASE.inputs(3)), expected)
    assert not model.peft_config["default"].use_qalora
    assert "QA-LoRA with groups of 2" in str(model.load_report)
    model.merge_adapter()
    assert_close(run(model, BASE.inputs(3)), expected)


def test_what_is_refused() -> None:
    fields = {**qalora(use_qalora=True, qalora_group_size=4), "target_modules": ["first"]}
    with pytest.raises(ValueError, match=r"first: .*in_features \(6\) to be divisible by `qalora_group_size` \(4\)"):
        splice.get_peft_model(on_codes(), splice.get_peft_config(fields))
    with pytest.raises(NotImplementedError, match="`use_qalora` with `use_dora` is not supported"):
        splice.get_peft_model(on_codes(), splice.get_peft_config({**fields, "qalora_group_size": 2, "use_dora": True}))
