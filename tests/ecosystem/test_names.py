"""The distribution called `peft`: its version, its paths and its names."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn

import splice
from splice.kinds.registry import all_methods
from tests.ecosystem.both import reference, shim_version


def told(_: int = 0) -> dict[str, Any]:
    import peft

    return {"version": peft.__version__, "file": peft.__file__}


@pytest.mark.shows("transformers", "finds the distribution `peft`, new enough")
def test_the_version_is_one_and_new_enough_for_transformers() -> None:
    from transformers.utils import is_peft_available

    assert peft.__version__ == version("peft") == shim_version()
    assert is_peft_available()
    assert peft.PeftModel is splice.PeftModel


def test_the_reference_is_asked_in_a_process_of_its_own() -> None:
    there = reference(told)
    assert there["version"].startswith("0.21")
    assert Path(there["file"]) != Path(peft.__file__)


def test_submodules_are_attributes_and_nothing_is_imported_before_it_is_asked_for() -> None:
    program = (
        "import peft, sys\n"
        "assert not {'torch', 'splice.model', 'peft.tuners'} & set(sys.modules)\n"
        "print(peft.tuners.lora.layer.LoraLayer.__name__, peft.utils.other.ModulesToSaveWrapper.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["LoraLayer", "ModulesToSaveWrapper"]


def test_a_star_gives_every_config_and_model() -> None:
    names: dict[str, Any] = {}
    exec("from peft import *", names)
    for method in all_methods().values():
        assert names[method.config.__name__] is method.config
    assert names["LoraModel"] is peft.tuners.lora.model.LoraModel
    assert {"tuners", "utils", "PeftModel", "LoraModel", "LoraConfig"} <= set(dir(peft))


def test_names_of_methods_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="NoSuchConfig"):
        peft.NoSuchConfig  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match="no_such_method"):
        import_module("peft.tuners.no_such_method")
    with pytest.raises(ImportError, match="NoSuchLayer"):
        from peft.tuners.lora.layer import NoSuchLayer  # noqa: F401


def test_tuners_and_layers_are_recognised_by_classes_of_their_method() -> None:
    from peft.tuners import ia3, lora
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    tuner = peft.LoraModel(network, peft.LoraConfig(target_modules=["0", "1"]), "mine")
    assert tuner.model is network
    assert isinstance(tuner, peft.LoraModel)
    assert not isinstance(tuner, peft.IA3Model)
    assert issubclass(peft.LoraModel, BaseTuner)
    assert issubclass(lora.Linear, lora.LoraLayer)
    assert issubclass(lora.LoraLayer, BaseTunerLayer)
    found = [[isinstance(layer, c) for layer in network] for c in (lora.LoraLayer, lora.Linear, lora.Embedding)]
    assert found == [[True, True, False], [False, True, False], [True, False, False]]
    assert not any(isinstance(layer, (ia3.Linear, lora.Linear4bit)) for layer in network)
    with pytest.raises(TypeError, match="IA3Config"):
        peft.IA3Model(nn.Linear(2, 2), peft.LoraConfig(), "default")
    with pytest.raises(TypeError, match="inject_adapter_in_model"):
        lora.Linear(nn.Linear(2, 2), "default", r=8)
