"""Words of messages that people's scripts look for: the reference says them, and so do we, with more around them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def tuned(library: Any, **fields: Any) -> Any:
    return library.get_peft_model(network(), library.LoraConfig(**{"target_modules": ["0"], **fields})).eval()


def two(library: Any, **fields: Any) -> Any:
    model = tuned(library, **fields)
    model.add_adapter("b", library.LoraConfig(**{"target_modules": ["0"], **fields}))
    return model


def merged(library: Any, **fields: Any) -> Any:
    model = tuned(library, **fields)
    model.merge_adapter()
    return model


def broken(library: Any) -> Any:
    model = tuned(library)
    model.base_model.model[0].lora_A["default"].weight.data.fill_(float("nan"))
    return model


def irregular(library: Any) -> None:
    model = tuned(library, target_modules=["0", "2"])
    first, _, last = model.base_model.model
    first.enable_adapters(False)
    with model.disable_adapter():
        assert first.disable_adapters
        assert last.disable_adapters
    assert not first.disable_adapters
    assert not last.disable_adapters


# What is done, and what both say.
SAID: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an unknown adapter": (lambda lib: tuned(lib).set_adapter("x"), "Adapter x not found"),
    "deleting an unknown adapter": (lambda lib: tuned(lib).delete_adapter("x"), "Adapter x does not exist"),
    "combining an unknown adapter": (
        lambda lib: two(lib).add_weighted_adapter(["default", "x"], [1.0, 1.0], "c"),
        "Adapter x does not exist",
    ),
    "deleting a merged adapter": (
        lambda lib: merged(lib).delete_adapter("default"),
        "Cannot delete adapter(s) ['default'] while they are merged. Please unmerge them first",
    ),
    "merging again": (lambda lib: merged(lib).merge_adapter(), "All adapters are already merged, nothing to do"),
    "unmerging what is not merged": (lambda lib: tuned(lib).unmerge_adapter(), "Already unmerged. Nothing to do."),
    "selecting while merged": (
        lambda lib: merged(lib).set_adapter("default"),
        "Adapter cannot be set when the model is merged. Unmerging the model first.",
    ),
    "merging no numbers": (
        lambda lib: broken(lib).merge_adapter(safe_merge=True),
        "NaNs detected in the merged weights. The adapter default seems to be broken",
    ),
    "two copies of a module": (
        lambda lib: two(lib, modules_to_save=["2"]).base_model.set_adapter(["default", "b"]),
        "Only one adapter can be set at a time for ModulesToSaveWrapper",
    ),
    "no targets": (
        lambda lib: tuned(lib, target_modules=[]),
        "No `target_modules` passed but also no `target_parameters` found",
    ),
    "targets that are not there": (
        lambda lib: tuned(lib, target_modules=["zz"], layers_to_transform=[1], layers_pattern="h"),
        "not found in the base model. Please check the target modules and try again",
    ),
    "layers that are not there": (
        lambda lib: tuned(lib, target_modules=["zz"], layers_to_transform=[1]),
        "You specified 'layers_to_transform': [1]",
    ),
    "everything excluded": (
        lambda lib: tuned(lib, exclude_modules=["0"]),
        "No modules were targeted for adaptation",
    ),
    "a layer that cannot be adapted": (
        lambda lib: tuned(lib, target_modules=["1"]),
        "is not supported. Currently, only the following modules are supported",
    ),
    "a name that is taken": (
        lambda lib: tuned(lib).add_adapter("default", lib.LoraConfig(target_modules=["0"])),
        "Adapter with name 'default' already exists",
    ),
    "another method": (
        lambda lib: tuned(lib).add_adapter("b", lib.IA3Config(target_modules=["0"], feedforward_modules=[])),
        "Cannot combine adapters with different peft types",
    ),
    "two that train biases": (
        lambda lib: two(lib, bias="all"),
        "supports only 1 adapter with bias",
    ),
    "no rank": (lambda lib: tuned(lib, r=0), "`r` should be a positive integer value but the value passed is 0"),
    "rows of an unknown adapter": (
        lambda lib: tuned(lib)(torch.zeros(2, 4), adapter_names=["default", "x"]),
        "Trying to infer with non-existing adapter(s): x",
    ),
    "too few rows": (
        lambda lib: tuned(lib)(torch.zeros(2, 4), adapter_names=["default"]),
        "Length of `adapter_names` should be the same as the number of inputs, but got 1 and 2 respectively",
    ),
    "rows in training": (
        lambda lib: tuned(lib).train()(torch.zeros(1, 4), adapter_names=["default"]),
        "Cannot pass `adapter_names` when the model is in training mode",
    ),
    "rows while merged": (
        lambda lib: merged(lib)(torch.zeros(1, 4), adapter_names=["default"]),
        "Cannot pass `adapter_names` when there are merged adapters",
    ),
    "no adapters": (lambda lib: lib.get_layer_status(network()), "No adapter layers found in the model, please ensure"),
    "deleting the active adapter": (
        lambda lib: two(lib).delete_adapter("default"),
        "Adapter default was active which is now deleted. Setting active adapter to b.",
    ),
    "some layers disabled": (
        irregular,
        "The model contains some adapter layers that are enabled and others that are disabled",
    ),
}


@pytest.mark.parametrize("library", [splice, peft], ids=["ours", "theirs"])
@pytest.mark.parametrize("case", SAID)
def test_what_is_said(case: str, library: Any, recwarn: pytest.WarningsRecorder) -> None:
    do, words = SAID[case]
    said = []
    try:
        do(library)
    except Exception as error:
        said.append(str(error))
    said += [str(warning.message) for warning in recwarn]
    # What stands between two sentences may differ.
    pattern = r".{0,80}".join(map(re.escape, words.split(". ")))
    assert any(re.search(pattern, text, re.DOTALL) for text in said), said
