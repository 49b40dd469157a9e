"""DoRA: on every kind of layer, alone and in company."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from splice.kinds.finishing import Finish
from tests import bases
from tests.bases import Base, run, tensors_of
from tests.comparing import (
    Snapshot,
    assert_close,
    assert_same_tensors,
    config_in,
    differ,
    load_both,
    named,
    parameters_of,
    state_of,
    tensors_in,
    trainable_names,
)

KINDS = (*bases.BY_KIND.values(), bases.NO_BIAS, bases.PADDED, bases.SCALED, bases.GROUPED, bases.CIRCULAR)
MERGEABLE = tuple(base for base in KINDS if base not in (bases.GROUPED, bases.CIRCULAR))
each = pytest.mark.parametrize("base", KINDS, ids=str)


def config(base: Base, **changes: Any) -> dict[str, Any]:
    targets = {"target_modules": list(base.targets), "task_type": base.task}
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_dora": True, **targets, **changes}


@each
def test_the_output_and_the_names_are_those_of_the_reference(base: Base, shared_checkpoint: Any) -> None:
    pair = load_both(base, shared_checkpoint(base, config(base)), is_trainable=True)
    assert differ(pair.assert_equal(), run(base.build(), base.inputs(3)))
    assert parameters_of(pair.ours) == parameters_of(pair.reference)
    assert set(state_of(pair.ours)) == set(state_of(pair.reference))
    for name in ("lora_magnitude_vector", "scaling"):
        assert list(getattr(pair.ours.base_model.model.first, name)) == ["default"]
    weight = pair.ours.base_model.model.first.lora_magnitude_vector["default"].weight
    assert torch.equal(weight, pair.reference.base_model.model.first.lora_magnitude_vector["default"].weight)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@each
def test_training(base: Base, dropout: float, shared_checkpoint: Any) -> None:
    pair = load_both(base, shared_checkpoint(base, config(base, lora_dropout=dropout)), is_trainable=True)
    found = []
    for model in (pair.reference, pair.ours):
        model.train()
        torch.manual_seed(3)
        model(**base.inputs(3)).square().sum().backward()
        found.append({name: p.grad for name, p in named(model) if p.grad is not None})
    assert set(found[1]) == set(found[0]) == trainable_names(pair.ours)
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, factor=20)


@pytest.mark.parametrize("base", MERGEABLE, ids=str)
def test_several_adapters(base: Base, shared_checkpoint: Any) -> None:
    """Active one after the other, in either order; merged together; and one merged under an active one."""
    other = config(base, target_modules=["first"], lora_alpha=9)
    pair = load_both(base, shared_checkpoint(base, config(base)), shared_checkpoint(base, other, seed=1))
    one = pair.assert_equal()
    pair.each(lambda model: model.base_model.set_adapter(["default", "second"]))
    both = pair.assert_equal()
    pair.ours.base_model.merge_adapter(["default"])
    assert_close(run(pair.ours, base.inputs(3)), both)
    pair.ours.base_model.unmerge_adapter()
    pair.each(lambda model: model.merge_adapter())
    assert_close(pair.assert_equal(), both)
    pair.ours.unmerge_adapter()
    assert torch.equal(run(pair.ours, base.inputs(3)), both)
    pair.ours.base_model.set_adapter(["second", "default"])
    assert differ(run(pair.ours, base.inputs(3)), one)
    pair.ours.set_adapter("default")
    assert torch.equal(run(pair.ours, base.inputs(3)), one)


@pytest.mark.parametrize("base", [bases.GROUPED, bases.CIRCULAR], ids=str)
def test_what_cannot_be_merged_is_refused(base: Base, shared_checkpoint: Any) -> None:
    model = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, config(base)))
    before = run(model, base.inputs(3))
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_adapter()
    assert torch.equal(run(model, base.inputs(3)), before)


@pytest.mark.parametrize("base", [bases.LINEAR, bases.EMBEDDING, bases.CONV2D], ids=str)
def test_each_row_with_its_own_adapter(base: Base, shared_checkpoint: Any) -> None:
    """Also beside an adapter of plain LoRA. The reference refuses it."""
    plain = config(base, use_dora=False, lora_alpha=9)
    pair = load_both(base, shared_checkpoint(base, config(base)), shared_checkpoint(base, plain, seed=1))
    rows = run(pair.ours, base.inputs(3), adapter_names=["second", "default", "__base__"])
    for row, name in enumerate(["second", "default"]):
        pair.reference.set_adapter(name)
        assert_close(rows[row], run(pair.reference, base.inputs(3))[row])
    assert_close(rows[2], run(base.build(), base.inputs(3))[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("base", [bases.LINEAR, bases.NO_BIAS, bases.TRANSPOSED], ids=str)
def test_rows_of_several_adapters_are_finished_together(
    base: Base, gradients: bool, dtype: torch.dtype, shared_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other ranks and scales, in any order, beside plain LoRA and the base."""
    finished: list[int] = []
    plain = Finish.__call__
    monkeypatch.setattr(Finish, "__call__", lambda self, y: finished.append(len(self.layers)) or plain(self, y))
    changes: list[dict[str, Any]] = [{}, {"r": 2}, {"lora_alpha": 9}, {"use_dora": False}]
    model: Any = None
    for seed, change in enumerate(changes):
        folder = shared_checkpoint(base, config(base, **change), seed=seed)
        if model is None:
            model = splice.PeftModel.from_pretrained(base.build().to(dtype), folder, "0", is_trainable=True)
        else:
            model.load_adapter(folder, str(seed), is_trainable=True)
    model.base_model.set_requires_grad(["0", "1", "2", "3"])
    names = ["2", "0", "__base__", "3", "1", "1", "0"]
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in base.inputs(7).items()}
    model.eval()

    def outputs(mixed: bool) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        model.zero_grad()
        with torch.set_grad_enabled(gradients):
            if mixed:
                found = tensors_of(model(**inputs, adapter_names=names))[0]
            else:
                found = torch.cat([alone(model, inputs, row, name) for row, name in enumerate(names)])
            if gradients:
                found.float().square().sum().backward()
        return found.detach(), [parameter.grad for parameter in model.parameters()]

    (got, got_grads), (want, want_grads) = outputs(mixed=True), outputs(mixed=False)
    assert finished and set(finished) == {3}
    assert_close(got, want)
    for one, other in zip(got_grads, want_grads):
        assert (one is None) is (other is None)
        if one is not None and other is not None:
            # Both sums are rounded to the dtype of the base on their way.
            torch.testing.assert_close(
                one, other, rtol=1e-4 if dtype is torch.float32 else 0.05, atol=1e-5 if dtype is torch.float32 else 5e-3
            )


def alone(model: Any, inputs: dict[str, torch.Tensor], row: int, name: str) -> torch.Tensor:
    """What one row is without those beside it."""
    one = {key: value[row : row + 1] for key, value in inputs.items()}
    if name == "__base__":
        with model.disable_adapter():
            return tensors_of(model(**one))[0]
    model.set_adapter(name)
    model.base_model.set_requires_grad(["0", "1", "2", "3"])
    return tensors_of(model(**one))[0]


@each
def test_taken_off_copied_and_pickled(base: Base, shared_checkpoint: Any) -> None:
    network = base.build()
    before, output = Snapshot.of(network), run(network, base.inputs(3))
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(base, config(base)))
    adapted = run(model, base.inputs(3))
    with model.disable_adapter():
        assert torch.equal(run(model, base.inputs(3)), output)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        weight = clone.base_model.model.first.weight.data
        weight.neg_()  # the copy looks at its own weights
        assert differ(run(clone, base.inputs(3)), adapted)
        assert torch.equal(run(model, base.inputs(3)), adapted)
        weight.neg_()
        assert_close(run(clone, base.inputs(3)), adapted)
        clone.unload()
    model.load_state_dict(model.state_dict())
    assert torch.equal(run(model, base.inputs(3)), adapted)
    model.unload()
    before.assert_same(network)


@pytest.mark.parametrize("initial", [True, False])
@each
def test_a_new_adapter_starts_where_that_of_the_reference_does(base: Base, initial: bool) -> None:
    made = []
    for library in (peft, splice):
        torch.manual_seed(5)
        fields = config(base, init_lora_weights=initial, alpha_pattern={"second": 3}, inference_mode=True)
        made.append(library.get_peft_model(base.build(), library.get_peft_config(fields)))
    reference, ours = (dict(named(model)) for model in made)
    for name, tensor in ours.items():
        if "magnitude" in name:
            path = name.removeprefix("base_model.model.").partition(".lora")[0]
            layer = made[1].base_model.model.get_submodule(path).splice_host.layers["default"]
            if initial:
                assert_close(tensor, reference[name])
            assert_close(tensor.flatten(), layer.norm(layer.base_weight(tensor.dtype)).flatten())
    assert_close(run(made[1], base.inputs(3)), run(base.build(), base.inputs(3))) if initial else None


def test_saved_again(shared_checkpoint: Any, tmp_path: Path) -> None:
    folder = shared_checkpoint(bases.MIXED, config(bases.MIXED))
    model = splice.PeftModel.from_pretrained(bases.MIXED.build(), folder)
    model.save_pretrained(tmp_path)
    assert_same_tensors(tensors_in(tmp_path), tensors_in(folder))
    assert config_in(tmp_path) == config_in(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(dtype: torch.dtype, autocast: bool, shared_checkpoint: Any) -> None:
    for base in (bases.LINEAR, bases.EMBEDDING):
        pair = load_both(
            base, shared_checkpoint(base, config(base)), dtype=dtype, autocast_adapter_dtype=autocast, is_trainable=True
        )
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in base.inputs(3).items()}
        assert_close(run(pair.ours, inputs), run(pair.reference, inputs))
        assert parameters_of(pair.ours) == parameters_of(pair.reference)


def test_a_bias_that_another_adapter_brings_keeps_its_size(shared_checkpoint: Any) -> None:
    base = bases.LINEAR
    first = config(base, use_dora=False, bias="lora_only")
    pair = load_both(base, shared_checkpoint(base, first), shared_checkpoint(base, config(base), seed=1))
    pair.each(lambda model: model.base_model.set_adapter(["default", "second"]))
    pair.assert_equal()
    own = load_both(base, shared_checkpoint(base, config(base, bias="lora_only")))
    own.assert_equal()


def test_a_row_is_scaled_around_its_own_bias_and_not_that_of_the_active_adapter(shared_checkpoint: Any) -> None:
    base = bases.LINEAR
    first = config(base, use_dora=False, bias="lora_only")
    model: Any = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, first))
    model.load_adapter(shared_checkpoint(base, config(base), seed=1), "second")
    rows = run(model, base.inputs(2), adapter_names=["second", "default"])
    model.set_adapter("second")
    assert_close(rows[0], run(model, base.inputs(2))[0])


def test_combinations_that_the_reference_refuses() -> None:
    with pytest.raises(ValueError, match="lora_bias"):
        splice.LoraConfig(use_dora=True, lora_bias=True)
    with pytest.raises(ValueError, match="megatron_config"):
        splice.LoraConfig(use_dora=True, megatron_config={"a": 1})
