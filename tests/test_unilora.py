"""What is peculiar to Uni-LoRA: one vector for all layers, and indices that follow from a seed and from all targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from splice.methods.unilora import UniLoraConfig
from tests import bases
from tests.comparing import run

CONFIG = {"r": 3, "theta_d_length": 37, "target_modules": ["first", "second"]}
# Of each layer.
FIXED = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [["first", "second"], ["second"]])
def test_indices_and_scales_are_the_references(dtype: torch.dtype, targets: list[str]) -> None:
    """To the bit; they depend on which layers are targets."""
    fields: dict[str, Any] = {**CONFIG, "target_modules": targets}
    ours = splice.get_peft_model(bases.LINEAR.build().to(dtype), UniLoraConfig(**fields))
    theirs = peft.get_peft_model(bases.LINEAR.build().to(dtype), peft.UniLoraConfig(**fields))
    for path in targets:
        mine, other = ours.get_submodule(f"base_model.model.{path}"), theirs.get_submodule(f"base_model.model.{path}")
        for name in FIXED:
            one, two = getattr(mine, name)["default"], getattr(other, name)["default"]
            assert one.dtype == two.dtype
            assert torch.equal(one, two), name


def test_known_indices() -> None:
    base = torch.nn.ModuleDict({"lin0": torch.nn.Linear(16, 24), "lin1": torch.nn.Linear(24, 16)})
    base.forward = lambda x: x  # type: ignore[method-assign]
    model = splice.get_peft_model(base, UniLoraConfig(r=3, theta_d_length=50, target_modules=["lin0", "lin1"]))
    one, two = (model.base_model.placed["default"][path] for path in ("lin0", "lin1"))
    assert one.tensor("unilora_indices_A")[0, :8].tolist() == [45, 3, 41, 15, 18, 28, 21, 0]
    assert one.tensor("unilora_indices_B")[0].tolist() == [17, 10, 46]
    assert two.tensor("unilora_indices_A")[0, :4].tolist() == [46, 16, 2, 40]
    assert torch.allclose(one.tensor("unilora_scales_A")[0, :3], torch.tensor([0.5, 0.44721359, 0.44721359]))


def test_all_layers_have_the_same_vector(tmp_path: Path) -> None:
    """In training, when it is exchanged in the tree, and in the file, which has it once."""
    model = splice.get_peft_model(bases.LINEAR.build(), UniLoraConfig(**CONFIG))
    theta = model.base_model.unilora_theta_d["default"]
    adapted = [
        layer
        for layer in model.modules()
        if hasattr(layer, "splice_host") and "unilora_theta_d" in dict(layer.named_children())
    ]
    assert len(adapted) == 2
    assert all(layer.unilora_theta_d["default"] is theta for layer in adapted)
    assert sum(p is theta for p in model.parameters()) == 1
    other = torch.nn.Parameter(torch.ones_like(theta))
    adapted[1].unilora_theta_d.default = other
    assert model.base_model.unilora_theta_d["default"] is other
    assert adapted[0].unilora_theta_d["default"] is other
    model.save_pretrained(tmp_path)
    keys = splice.get_peft_model_state_dict(model).keys()
    assert list(keys) == ["base_model.unilora_theta_d"]


def test_a_new_adapter_is_drawn_within_its_bound() -> None:
    torch.manual_seed(0)
    model = splice.get_peft_model(
        bases.LINEAR.build(), UniLoraConfig(**{**CONFIG, "theta_d_length": 5000, "r": 100}, init_theta_d_bound=0.5)
    )
    theta = model.base_model.unilora_theta_d["default"].detach()
    assert 0.49 < float(theta.abs().max()) <= 0.5


def test_each_adapter_saves_its_own_indices(tmp_path: Path) -> None:
    """Beside one that does not: the reference keeps the last one's answer for both."""
    model = splice.get_peft_model(bases.LINEAR.build(), UniLoraConfig(**CONFIG, save_indices=True))
    model.add_adapter("second", UniLoraConfig(**CONFIG, proj_seed=3))
    first, second = (splice.get_peft_model_state_dict(model, adapter_name=name) for name in ("default", "second"))
    assert sum("indices" in key for key in first) == 4
    assert all(not tensor.is_floating_point() for key, tensor in first.items() if "indices" in key)
    assert list(second) == ["base_model.unilora_theta_d"]
    model.save_pretrained(tmp_path)
    again = splice.PeftModel.from_pretrained(bases.LINEAR.build(), tmp_path)
    inputs = bases.LINEAR.inputs(2)
    assert torch.equal(run(again, inputs), run(model, inputs))


@pytest.mark.parametrize(
    "fields",
    [{"r": 0}, {"theta_d_length": 0}, {"unilora_dropout": 1.5}, {"init_theta_d_bound": 0.0}, {"bias": "some"}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_config_without_meaning_is_refused(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=name):
        UniLoraConfig(**fields)
    with pytest.raises(ValueError, match=name):
        peft.UniLoraConfig(**fields)
