"""Biases of the base that an adapter trains: where they stand, and files that hold none of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import splice
from splice.base.layers import LayerKind
from tests import bases
from tests.bases import Base, run
from tests.comparing import (
    Snapshot,
    assert_close,
    assert_same_tensors,
    config_in,
    load_both,
    tensors_in,
    trainable_names,
)
from tests.conftest import write_checkpoint
from tests.samples import Case, plain_cases


class _Rooted(nn.Module):
    """A network that has a bias itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.tanh(self.first(x)))) + self.bias


ROOTED = Base("rooted", _Rooted, lambda rows: {"x": torch.randn(rows, 8)}, frozenset({LayerKind.LINEAR}), ("first",))


def bias_cases() -> list[Any]:
    """Every method that can train biases of the base, with each way to say which."""
    found = []
    for case in plain_cases(bases.LINEAR):
        bias = next((field for field in dataclasses.fields(case.method.config) if field.name == "bias"), None)
        for which in ("all", "only") if bias is not None else ():
            value = which if which == "all" else _only(case)
            found.append(pytest.param(case, value, id=f"{case.method.name.value}-{value}"))
    return found


def _only(case: Case) -> str:
    """The value for the biases of the targets alone, which begins with the method's name."""
    known = [option["bias"] for option in case.sample.options.values() if option.get("bias", "all") != "all"]
    return known[0] if known else f"{case.method.name.value.lower()}_only"


each = pytest.mark.parametrize(("case", "bias"), bias_cases())


@each
def test_a_bias_of_the_network_itself(case: Case, bias: str, tmp_path: Path) -> None:
    case = Case(case.method, ROOTED)
    folder = write_checkpoint(tmp_path / "theirs", ROOTED, case.config(bias=bias))
    network = ROOTED.build()
    before = Snapshot.of(network)
    pair = load_both(ROOTED, folder)
    x = ROOTED.inputs(3)
    assert_close(run(pair.ours, x), run(pair.reference, x))
    assert trainable_names(pair.ours) == trainable_names(pair.reference)
    pair.ours.save_pretrained(tmp_path / "ours")
    assert_same_tensors(tensors_in(tmp_path / "ours"), tensors_in(folder))
    model = splice.PeftModel.from_pretrained(network, folder)
    model.load_adapter(folder, "default")
    before.assert_same(model.unload())


@pytest.mark.parametrize("is_trainable", [False, True], ids=["frozen", "trained"])
@each
def test_a_file_without_biases_means_those_of_the_base(
    case: Case, bias: str, is_trainable: bool, tmp_path: Path
) -> None:
    """The reference goes on from them, and so does who loads the file twice, or over an adapter that was trained."""
    folder = write_checkpoint(tmp_path / "theirs", case.base, case.config(bias=bias))
    kept = {name: tensor for name, tensor in tensors_in(folder).items() if not name.endswith(".bias")}
    assert len(kept) < len(tensors_in(folder))
    whole = tmp_path / "whole"
    folder.rename(whole)
    folder.mkdir()
    (folder / "adapter_config.json").write_text((whole / "adapter_config.json").read_text())
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    pair = load_both(case.base, folder, is_trainable=is_trainable)
    pair.each(lambda model: model.eval())
    expected = pair.assert_equal()
    assert trainable_names(pair.ours) == trainable_names(pair.reference)
    pair.each(lambda model: model.save_pretrained(tmp_path / type(model).__module__.partition(".")[0]))
    assert_same_tensors(tensors_in(tmp_path / "splice"), tensors_in(tmp_path / "peft"))
    assert config_in(tmp_path / "splice")["bias"] == bias
    again = splice.PeftModel.from_pretrained(case.base.build(), whole)
    again.load_adapter(folder, "default")
    assert torch.equal(run(again, case.base.inputs(3)), expected)


def test_a_file_with_some_of_the_biases_is_refused(tmp_path: Path) -> None:
    case = Case(plain_cases(bases.LINEAR)[0].method, bases.LINEAR)
    folder = write_checkpoint(tmp_path / "a", case.base, case.config(bias="all"))
    tensors = tensors_in(folder)
    del tensors[next(name for name in tensors if name.endswith(".bias"))]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(splice.AdapterMismatchError, match="bias"):
        splice.PeftModel.from_pretrained(case.base.build(), folder)
