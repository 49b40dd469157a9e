"""Deleting an adapter: its memory is free at once, nothing names it any more, and others cost nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splice
from tests import bases
from tests.bases import run
from tests.counting import calls_of, lines_run
from tests.samples import Case, as_stored, kind_cases, network_cases, plain_cases

CASES = [*kind_cases(), *plain_cases(bases.MIXED, bases.LLAMA, bases.TIED), *as_stored(network_cases(bases.LLAMA))]
LORA = {"peft_type": "LORA", "r": 2, "target_modules": list(bases.LLAMA.targets)}


@contextmanager
def without_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def held_by(model: Any, name: str) -> list[torch.Tensor]:
    layers = model.base_model.placed[name].values()
    return [registry[key] for layer in layers for registry, key, _ in layer.registered.values()]


def names_in(model: nn.Module) -> Iterator[str]:
    for module in (model, *(m for m in model.modules() if m is not model)):
        yield from (name for name, _ in module.named_modules())
        yield from module.state_dict()
        yield from (name for name, _ in (*module.named_parameters(), *module.named_buffers()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_memory_is_free_at_once_and_the_name_is_gone(case: Case, shared_checkpoint: Any) -> None:
    """Also after calls, mixed batches and training, and though no collection comes by."""
    model: Any = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    known = set(names_in(model))
    model.load_adapter(shared_checkpoint(case.base, case.other_config(), seed=1), "goner")
    model.set_adapter("goner")
    inputs = case.base.inputs(2)
    bases.tensors_of(model.train()(**inputs))[0].sum().backward()
    model.eval()
    run(model, inputs, adapter_names=["goner", "__base__"])
    model.set_adapter("default", inference_mode=True)
    run(model, inputs, adapter_names=["goner", "default"])
    kept = {id(tensor) for name in ("default",) for tensor in held_by(model, name)}
    with without_collections():
        gone = [weakref.ref(t) for t in held_by(model, "goner") if id(t) not in kept]
        layers = [weakref.ref(layer) for layer in model.base_model.placed["goner"].values()]
        model.delete_adapter("goner")
        assert not [ref for ref in (*gone, *layers) if ref() is not None]
    assert set(names_in(model)) == known
    assert not [name for name, told in vars(model.base_model).items() if isinstance(told, dict) and "goner" in told]


class Named(str):
    """A name whose comparisons are calls, which can be counted."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __lt__(self, other: str) -> bool:
        return str(self) < str(other)


PLAIN = {"peft_type": "LORA", "r": 2, "target_modules": ["0", "1", "2"]}
OTHERS: dict[str, dict[str, Any]] = {
    "alike": {},
    "shared by its layers": {"peft_type": "VERA"},
    "in the place of the base's": {"bias": "lora_only"},
}


@pytest.mark.parametrize("active", [False, True], ids=["", "active"])
@pytest.mark.parametrize("what", OTHERS)
def test_the_work_is_the_same_among_many(what: str, active: bool) -> None:
    """Of an adapter whose tensors stand elsewhere too, and of the active one, for which another takes over."""

    def work(count: int) -> int:
        network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        model: Any = splice.get_peft_model(network, splice.get_peft_config(dict(PLAIN)), Named("m"), mixed=True)
        for number in range(count):
            model.add_adapter(Named(f"n{number}"), splice.get_peft_config({**PLAIN, "inference_mode": True}))
        model.add_adapter("goner", splice.get_peft_config({**PLAIN, **OTHERS[what]}))
        model.set_adapter("goner" if active else "m")
        model.base_model.set_requires_grad(["m"])  # so that it has been looked where its flags are
        return lines_run(lambda: model.delete_adapter("goner"))

    few, many = work(3), work(60)
    assert many <= few + 25, (few, many)


def test_the_next_active_one_is_the_first_of_the_alphabet() -> None:
    """However the others came and went."""
    model: Any = splice.get_peft_model(bases.LLAMA.build(), splice.get_peft_config(dict(LORA)), adapter_name="k")
    for turn in range(40):  # names that have gone must not pile up
        for name in (f"a{turn}", f"a{turn}+"):
            model.add_adapter(name, splice.get_peft_config(dict(LORA)))
        for name in (f"a{turn}", f"a{turn}+"):
            model.delete_adapter(name)
    for name in ("q", "c", "b"):
        model.add_adapter(name, splice.get_peft_config(dict(LORA)))
    model.delete_adapter("b")
    with pytest.warns(UserWarning, match="Adapter k was active which is now deleted. Setting active adapter to c."):
        model.delete_adapter("k")
    model.add_adapter("b", splice.get_peft_config(dict(LORA)))
    with pytest.warns(UserWarning, match="Setting active adapter to b."):
        model.delete_adapter("c")
    assert model.active_adapters == ["b"]
    assert model.base_model._first_name._sorted == ["b", "q"]


def test_switching_and_disabling_frozen_adapters_touches_no_layer(tmp_path: Path) -> None:
    """A few calls, however many layers and adapters there are."""

    def work(blocks: int, count: int) -> tuple[int, int]:
        network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(blocks)))
        config = {"peft_type": "LORA", "r": 2, "target_modules": [str(block) for block in range(blocks)]}
        model: Any = splice.get_peft_model(network, splice.get_peft_config({**config, "inference_mode": True}), "n0")
        for number in range(1, count):
            model.add_adapter(f"n{number}", splice.get_peft_config({**config, "inference_mode": True}))
        model.set_adapter("n0", inference_mode=True)
        switch = calls_of(lambda: model.set_adapter(f"n{count - 1}", inference_mode=True))
        return switch, calls_of(model.base_model.disable_adapter_layers)

    assert work(40, 50) == work(2, 2)
    assert max(work(40, 50)) < 60


def test_the_encoder_of_a_deleted_prompt_says_so() -> None:
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    model: Any = splice.get_peft_model(bases.LLAMA.build(), splice.get_peft_config(dict(config)))
    model.add_adapter("goner", splice.get_peft_config(dict(config)))
    encoder = model.prompt_encoder["goner"]
    assert encoder().shape[0] == 3
    model.delete_adapter("goner")
    with pytest.raises(RuntimeError, match="PromptEmbedding is of an adapter that was deleted"):
        encoder()
    assert encoder.embedding.weight.shape[0] == 3
