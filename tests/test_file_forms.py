"""Adapter layers whose checkpoints hold another form of their tensors than memory does: each way is the other's inverse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import splice
from splice.kinds.file_form import FileForm
from splice.kinds.layer import AdapterLayer
from splice.kinds.registry import all_methods
from splice.loading.converting import from_file
from splice.surgery.placement import Placement
from tests import bases
from tests.bases import run
from tests.comparing import assert_close, assert_same_tensors, tensors_in
from tests.samples import SAMPLES, Case
from tests.test_kinds import used_by

Tensors = dict[str, torch.Tensor]
METHODS = [m for m in all_methods().values() if any(cls.file_form.converts for cls in used_by(m))]
CASES = [
    Case(method, bases.LLAMA, option)
    for method in METHODS
    for option in ("", *SAMPLES[method.name].options, *SAMPLES[method.name].file_forms)
]


def made(case: Case) -> Any:
    torch.manual_seed(4)
    return splice.get_peft_model(case.base.build(), splice.get_peft_config(case.config()))


def converted(model: Any) -> list[tuple[Placement, AdapterLayer]]:
    """The layers of the adapter whose tensors have another form in a checkpoint, with their places in its plan."""
    tuner = model.base_model
    placed = [(p, tuner.placed["default"][p.path]) for p in tuner.plans["default"].placements]
    return [(placement, layer) for placement, layer in placed if placement.in_file is not None]


FORMS = [case for case in CASES if converted(made(case))]
every = pytest.mark.parametrize("case", FORMS, ids=str)


def on_disk(layer: AdapterLayer, tensors: Tensors) -> Tensors:
    return {suffix: tensor.detach() for suffix, tensor in layer.file_form.to_file(layer, tensors)}


def test_every_form_is_tried() -> None:
    forms = {type(cls.file_form) for method in METHODS for cls in used_by(method) if cls.file_form.converts}
    tried = {type(layer.file_form) for case in FORMS for _, layer in converted(made(case))}
    assert forms == tried
    assert {form for form in _below(FileForm) if form.converts and form.__module__.startswith("splice.")} == forms


def _below(form: type[FileForm]) -> set[type[FileForm]]:
    return {form}.union(*(_below(child) for child in form.__subclasses__()))


@every
def test_from_memory_to_a_file_and_back(case: Case) -> None:
    for placement, layer in converted(made(case)):
        held = {suffix: tensor.detach() for suffix, tensor in layer.named_slots()}
        file = on_disk(layer, held)
        assert {suffix: tuple(tensor.shape) for suffix, tensor in file.items()} == {
            suffix: slot.shape for suffix, slot in placement.stored.items() if slot.stored
        }
        back = from_file(placement, file)
        assert {suffix: tuple(tensor.shape) for suffix, tensor in back.items()} == {
            suffix: tuple(tensor.shape) for suffix, tensor in held.items()
        }
        if not case.sample.keeps_less_in_file:
            assert_same_tensors(back, held)


@every
def test_from_a_file_to_memory_and_back(case: Case) -> None:
    """What the file says is said again: to the bit, but for what a form works out anew."""
    for placement, layer in converted(made(case)):
        file = on_disk(layer, dict(layer.named_slots()))
        back = from_file(placement, file)
        again = on_disk(layer, back)
        if case.sample.keeps_less_in_file:
            assert again.keys() == file.keys()
            for suffix, tensor in file.items():
                assert_close(again[suffix], tensor)
        else:
            assert_same_tensors(again, file)


@every
def test_what_lacks_a_part_is_left_out(case: Case) -> None:
    """Either way: half a tensor is none, and what is whole is what it was."""
    for placement, layer in converted(made(case)):
        held = {suffix: tensor.detach() for suffix, tensor in layer.named_slots()}
        file = on_disk(layer, held)
        back = from_file(placement, file)
        _check_parts(partial(from_file, placement), file, back)
        _check_parts(partial(on_disk, layer), held, file)


def _check_parts(way: Callable[[Tensors], Tensors], given: Tensors, whole: Tensors) -> None:
    for left_out in given:
        found = way({suffix: tensor for suffix, tensor in given.items() if suffix != left_out})
        assert len(found) < len(whole)
        assert_same_tensors(found, {suffix: whole[suffix] for suffix in found})


@every
def test_no_tensor_of_a_layer_lies_where_another_does(case: Case) -> None:
    for placement, layer in converted(made(case)):
        back = from_file(placement, on_disk(layer, dict(layer.named_slots())))
        assert len({tensor.untyped_storage().data_ptr() for tensor in back.values()}) == len(back)


@every
def test_saved_loaded_and_saved_again(case: Case, tmp_path: Path) -> None:
    model = made(case)
    model.save_pretrained(tmp_path / "first")
    loaded = splice.PeftModel.from_pretrained(case.base.build(), tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    first, second = (tensors_in(tmp_path / name) for name in ("first", "second"))
    inputs = case.base.inputs(3)
    assert_close(run(loaded, inputs), run(model.eval(), inputs))
    if case.sample.keeps_less_in_file:
        assert {name: tensor.shape for name, tensor in first.items()} == {n: t.shape for n, t in second.items()}
    else:
        assert (tmp_path / "first" / "adapter_model.safetensors").read_bytes() == (
            tmp_path / "second" / "adapter_model.safetensors"
        ).read_bytes()
