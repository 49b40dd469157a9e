"""How messages are worded: numbers with their nouns, and a place for everything that is said to be somewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import splice
from splice.checkpoint.types import PeftType
from splice.errors import counted
from splice.kinds.registry import all_methods
from splice.loading.report import LoadReport
from tests import bases
from tests.samples import Case, network_cases


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 layers"), (1, "1 layer"), (2, "2 layers"), (1000, "1000 layers")], ids=str
)
def test_a_number_and_its_noun(number: int, words: str) -> None:
    assert counted(number, "layer") == words
    assert counted(number, "layer has", "layers have").endswith("layer has" if number == 1 else "layers have")


def test_one_layer_in_the_report() -> None:
    report = LoadReport("a", 1, 1, 1, 10, 0.001)
    assert str(report).startswith("a: 1 of 1 tensor on 1 layer, ")


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Any) -> Any:
        return self.other(x)


def test_one_layer_that_no_call_reaches(tmp_path: Path) -> None:
    config = splice.LoraConfig(r=1, target_modules=["one"])
    splice.get_peft_model(_Unused(), config).save_pretrained(tmp_path)
    model = splice.PeftModel.from_pretrained(_Unused(), tmp_path)
    with pytest.warns(splice.PeftWarning, match=r"the first call did not reach its only layer \(one\)"):
        model(bases.LINEAR.inputs(1)["x"][..., :2])


@pytest.mark.parametrize("case", network_cases(bases.LLAMA), ids=str)
def test_what_acts_on_the_call_has_a_place_in_messages(case: Case, shared_checkpoint: Any) -> None:
    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    with pytest.raises(NotImplementedError, match="^the network itself: adapter 'default' cannot be merged"):
        model.merge_adapter()


@pytest.mark.parametrize("spelled", [str.upper, str.lower], ids=["as it is", "in lower case"])
@pytest.mark.parametrize("name", [name for name in PeftType if name not in all_methods()], ids=lambda name: name.value)
def test_a_method_that_is_not_built_yet(name: PeftType, spelled: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": spelled(name.value)}))
    with pytest.raises(
        splice.UnknownMethodError, match=f"of the method '{name.value}' cannot be loaded by this version"
    ):
        splice.PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "is_base"),
    [
        ({"base_model_name_or_path": "a/b"}, True),
        ({"base_model_name_or_path": "a/b", "revision": None, "task_type": None, "peft_type": None}, None),
        ({"base_model": "a/b", "task_type": "CAUSAL_LM"}, True),
        ({"base_model": "a/b", "epochs": 3}, False),
        ({}, False),
    ],
    ids=str,
)
def test_a_config_that_only_names_a_base(fields: dict[str, Any], is_base: bool | None, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(splice.CheckpointError, match="peft_type") as caught:
        splice.PeftConfig.from_pretrained(tmp_path)
    assert ("names a base model and nothing else" in str(caught.value)) is bool(is_base)
