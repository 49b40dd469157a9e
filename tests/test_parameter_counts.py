"""How many parameters the documentation says that a method trains: as many as the reference's adapter has."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from benchmarks.methods import REQUIRED

from splice.kinds.registry import Method, all_methods


def _counting() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parameters", Path(__file__).parents[1] / "docs" / "parameters.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COUNTING = _counting()


@pytest.mark.parametrize("method", list(all_methods().values()), ids=lambda m: m.name.value)
def test_the_parameters_in_the_table_are_those_of_the_reference(method: Method) -> None:
    """On a smaller layer, as some of them decompose its weight; the page is made by the same function."""
    required = REQUIRED.get(method.name.value, {})
    found = COUNTING.parameters(method, 256, required)
    if method.experts is not None:
        assert found is None
        return
    base = COUNTING.network(256).to_empty(device="cpu")
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, peft.get_peft_config(COUNTING.fields_of(method, required)))
    assert found == theirs.get_nb_trainable_parameters()[0]
