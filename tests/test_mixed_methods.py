"""Adapters of several methods on one model, also in one batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from splice.checkpoint.types import PeftType
from tests import bases
from tests.bases import Base, run
from tests.comparing import Snapshot, assert_close, differ
from tests.samples import Case, plain_cases

PLACES: list[Base] = [bases.LINEAR, bases.CONV2D, bases.LLAMA]
# What the reference loads into a mixed model too.
SHARED = {PeftType.LORA, PeftType.LOHA, PeftType.LOKR}


def cases(base: Base) -> list[Case]:
    return plain_cases(base)


def mixed(base: Base, shared_checkpoint: Any, network: Any) -> tuple[Any, list[str]]:
    """The network with one adapter of every method that can be put on it."""
    first, *others = cases(base)
    folder = shared_checkpoint(base, first.config())
    model = splice.PeftMixedModel.from_pretrained(network, folder, adapter_name=first.method.name.value)
    for case in others:
        model.load_adapter(shared_checkpoint(base, case.config()), case.method.name.value)
    return model, [case.method.name.value for case in (first, *others)]


@pytest.mark.parametrize("base", PLACES, ids=str)
def test_each_row_with_an_adapter_of_another_method(base: Base, shared_checkpoint: Any) -> None:
    model, names = mixed(base, shared_checkpoint, base.build())
    names = [*names, "__base__", names[0]]
    inputs = base.inputs(len(names))
    together = run(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        one = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        if name == "__base__":
            alone = run(base.build(), one)
        else:
            model.set_adapter(name)
            alone = run(model, one)
            assert differ(alone, run(base.build(), one)), name
        assert_close(together[row : row + 1], alone, factor=5)


@pytest.mark.parametrize("base", PLACES, ids=str)
def test_several_at_once_are_merged_as_they_compute(base: Base, shared_checkpoint: Any) -> None:
    network = base.build()
    before = Snapshot.of(network)
    model, names = mixed(base, shared_checkpoint, network)
    layers = [layer.splice_host.layers for layer in model.base_model.adapted.values()]
    fixed = {name for found in layers for name, layer in found.items() if not layer.mergeable}
    inexact = {name for found in layers for name, layer in found.items() if not layer.merges_exactly}
    whole = {name for found in layers for name, layer in found.items() if layer.stays_merged}
    for one, two in itertools.combinations(names, 2):
        model.set_adapter([one, two])
        both = run(model, base.inputs(3))
        if {one, two} & fixed:
            with pytest.raises(NotImplementedError, match="is no change of weights"):
                model.merge_adapter()
        elif one in whole and any(one in found and two in found for found in layers):
            with pytest.raises(NotImplementedError, match=f"'{two}' cannot be merged together with '{one}'"):
                model.merge_adapter()
        elif not {one, two} & inexact:
            model.merge_adapter()
            assert_close(run(model, base.inputs(3)), both, factor=20)
            model.unmerge_adapter()
        assert torch.equal(run(model, base.inputs(3)), both)
    before.assert_same(model.unload())


def test_two_methods_are_the_references(shared_checkpoint: Any) -> None:
    """Whatever is put on first is the innermost."""
    base = bases.LINEAR
    folders = {c.method.name: shared_checkpoint(base, c.config()) for c in cases(base) if c.method.name in SHARED}
    for one, two in itertools.permutations(folders.values(), 2):
        outputs = []
        for library in (peft, splice):
            model: Any = library.PeftMixedModel.from_pretrained(base.build(), str(one), adapter_name="one")
            model.load_adapter(str(two), adapter_name="two")
            model.set_adapter(["one", "two"])
            outputs.append(run(model.eval(), base.inputs(3)))
        assert_close(outputs[1], outputs[0], factor=5)
        assert differ(outputs[1], run(base.build(), base.inputs(3)))


def test_what_a_mixed_model_does_not_do(tmp_path: Path) -> None:
    model: Any = splice.get_peft_model(bases.LINEAR.build(), splice.LoraConfig(target_modules=["first"]), mixed=True)
    with pytest.raises(NotImplementedError, match="several methods"):
        model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="not supported"):
        model.get_layer_status()
    with pytest.raises(ValueError, match="call of the whole network"):
        model.add_adapter("prompt", splice.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="unknown (not found|does not exist)"):
        model.delete_adapter(["default", "unknown"])


def test_it_tells_and_trains_what_is_active_as_the_reference_does(shared_checkpoint: Any) -> None:
    base = bases.LINEAR
    folder = shared_checkpoint(base, next(case for case in cases(base) if case.method.name == "LOHA").config())
    trained = []
    for library in (peft, splice):
        config = library.LoraConfig(r=2, target_modules=["first"], modules_to_save=["head"])
        model = library.get_peft_model(base.build(), config, mixed=True)
        assert model.active_adapter == ["default"]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.load_adapter(folder, "second")
        names = {name.replace(".base_layer", "") for name, p in model.named_parameters() if p.requires_grad}
        model.set_adapter(["default", "second"])
        trained.append((names, model.active_adapter, model.modules_to_save))
        assert model.set_modules_to_save(config, "default") is None
    assert trained[1] == trained[0]
    with pytest.raises(ValueError, match=r"has no copies of \['other'\].*with which it is added"):
        model.set_modules_to_save(splice.LoraConfig(modules_to_save=["other"]), "default")
