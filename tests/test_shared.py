"""Tensors that some layers of an adapter share: they are one in memory, in training and in what is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splice
from splice.checkpoint.types import PeftType
from splice.kinds import registry
from tests import bases
from tests.bases import run
from tests.broken import unchanged
from tests.comparing import tensors_in

# All of one shape.
TARGETS = ["q_proj", "o_proj"]
SHARED = ("hada_w1_a", "hada_w1_b")


def first_leads(targets: Sequence[tuple[str, nn.Module]], config: Any) -> Mapping[str, Mapping[str, str]]:
    """All targets share two of their tensors with the first."""
    (leader, _), *others = targets
    return {path: dict.fromkeys(SHARED, leader) for path, _ in others}


@pytest.fixture
def _grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that has groups, whose layers are those of one that has none."""
    methods = dict(registry.all_methods())
    methods[PeftType.LOHA] = methods[PeftType.LOHA]._replace(groups=first_leads)
    monkeypatch.setattr(registry, "_METHODS", methods)


def made(base: bases.Base, **options: Any) -> Any:
    config = splice.LoHaConfig(r=2, target_modules=TARGETS, init_weights=False, task_type=base.task)
    return splice.get_peft_model(base.build(), config, **options)


def held(model: Any, suffix: str) -> list[torch.Tensor]:
    placed = model.base_model.placed["default"].values()
    return [layer.tensor(suffix) for layer in placed]


@pytest.mark.usefixtures("_grouped")
def test_a_group_is_one_tensor(tmp_path: Path) -> None:
    base = bases.LLAMA
    model = made(base)
    assert len({id(tensor) for tensor in held(model, SHARED[0])}) == 1
    assert len({id(tensor) for tensor in held(model, "hada_w2_a")}) == len(held(model, "hada_w2_a")) > 1
    model.save_pretrained(tmp_path)
    names = [name for name in tensors_in(tmp_path) if name.endswith(SHARED[0])]
    assert len(names) == len(held(model, SHARED[0]))
    loaded = splice.PeftModel.from_pretrained(base.build(), tmp_path, is_trainable=True)
    assert torch.equal(run(loaded, base.inputs(3)), run(model, base.inputs(3)))
    assert loaded.load_report.placed == loaded.load_report.expected < len(tensors_in(tmp_path))
    loaded(**base.inputs(3)).logits.square().sum().backward()
    torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1).step()
    assert len({id(tensor) for tensor in held(loaded, SHARED[0])}) == 1
    before = run(loaded, base.inputs(3)).detach()
    loaded.merge_adapter()
    torch.testing.assert_close(run(loaded, base.inputs(3)), before, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_grouped")
def test_exchanged_in_one_place_it_is_exchanged_in_all() -> None:
    """transformers' loader puts other parameters in the place of those of one layer."""
    model = made(bases.LLAMA)
    placed = list(model.base_model.placed["default"].values())
    new = nn.Parameter(torch.ones_like(placed[1].tensor(SHARED[0])))
    getattr(placed[1].base, SHARED[0]).default = new
    assert all(tensor is new for tensor in held(model, SHARED[0]))


@pytest.mark.usefixtures("_grouped")
def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = bases.LLAMA
    made(base).save_pretrained(tmp_path)
    tensors = tensors_in(tmp_path)
    key = [name for name in tensors if name.endswith(SHARED[0])][-1]
    save_file({**tensors, key: tensors[key] + 1}, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    network = base.build()
    with unchanged(network), pytest.raises(splice.AdapterMismatchError, match=f"has different tensors for {key}"):
        splice.PeftModel.from_pretrained(network, tmp_path)
