"""Names beside the large ones: DoRA's cache, MonteCLoRA's trainer, KappaTune, AdaLoRA's allocator, what LoRA subtracts."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import peft.helpers
import pytest
import torch
from torch import nn

import splice
from splice.kappatune import KappaTuneSelector
from splice.methods.lora.dora import DoraLinear
from splice.methods.lora.dora_caching import DoraCaching
from splice.methods.lora.monteclora_training import MontecloraTrainerMixin
from tests import bases
from tests.bases import run, tensors_of
from tests.comparing import assert_close, differ


def made(library: Any, network: nn.Module, config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(network, config)


# -- DoraCaching


def dora() -> tuple[Any, DoraLinear]:
    config = splice.LoraConfig(r=2, target_modules=["first"], use_dora=True, init_lora_weights=False)
    model = made(splice, bases.LINEAR.build(), config).eval()
    layer = model.base_model.placed["default"]["first"]
    assert isinstance(layer, DoraLinear)
    return model, layer


def count_measures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What it gives grows by one at each norm that is measured."""
    measured: list[str] = []
    plain = DoraLinear.total
    monkeypatch.setattr(DoraLinear, "total", lambda self, weight: measured.append("") or plain(self, weight))
    return measured


def changed(tensor: torch.Tensor) -> None:
    """In one place alone, and in a way that the tensor knows nothing of."""
    tensor.data[-1, 0] += 0.125


def test_norms_are_kept_until_a_value_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer = dora()
    inputs = bases.LINEAR.inputs(3)
    before = run(model, inputs)
    measured = count_measures(monkeypatch)
    assert torch.equal(run(model, inputs), before) and not measured
    for tensor in (layer.a, layer.b, layer.base.weight):
        changed(tensor)
        after = run(model, inputs)
        layer.kept = None
        assert torch.equal(run(model, inputs), after)
        assert differ(after, before) and len(measured) == 2
        measured.clear()
        before = after
    layer.scale *= 2
    run(model, inputs)
    assert len(measured) == 1
    # A small number beside large ones, and two that change places.
    weight = layer.base.weight.data
    weight[0, :2] = weight[0, :2].flip(0)
    run(model, inputs)
    weight[1, 0] += weight[1].norm() * 1e-5
    run(model, inputs)
    assert len(measured) == 3


def test_norms_of_gradients_and_of_inference_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer = dora()
    inputs = bases.LINEAR.inputs(3)
    model.base_model.set_requires_grad("default")
    with torch.inference_mode():
        model(**inputs)
    measured = count_measures(monkeypatch)
    tensors_of(model(**inputs))[0].sum().backward()
    assert not measured and layer.magnitude.grad is not None
    run(model.train(), inputs)
    assert measured


def test_in_half_precision_norms_are_kept_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on other devices, where values cannot be compared in passing. No copy has a norm of another model."""
    model, layer = dora()
    run(model, bases.LINEAR.inputs(3))
    assert layer.kept is not None
    copied = copy.deepcopy(model)
    layer = copied.base_model.placed["default"]["first"]
    assert layer.kept is None
    half, inputs = copied.bfloat16(), {key: value.bfloat16() for key, value in bases.LINEAR.inputs(3).items()}
    run(half, inputs)
    assert layer.kept is None
    measured = count_measures(monkeypatch)
    with DoraCaching():
        before = run(half, inputs)
        assert torch.equal(run(half, inputs), before) and len(measured) == 1
        with DoraCaching(enabled=False):
            changed(layer.base.weight)
            after = run(half, inputs)
        assert torch.equal(run(half, inputs), after) and differ(after, before)
        run(half.train(), inputs)
        assert layer.kept is None


def test_what_is_measured_inside_autocast_is_kept_by_nobody() -> None:
    """It has been rounded to half precision on its way; and what was measured outside is more than inside is asked for."""
    model, layer = dora()
    inputs = bases.LINEAR.inputs(3)
    expected, fresh = run(copy.deepcopy(model), inputs), copy.deepcopy(model)
    for caching in (False, True):
        layer.kept = None
        with DoraCaching(enabled=caching):
            with torch.autocast("cpu", torch.bfloat16):
                inside = run(model, inputs)
            assert torch.equal(run(model, inputs), expected)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(run(model, inputs), inside) and torch.equal(run(fresh, inputs), inside)


def test_inside_no_value_is_read_to_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer = dora()
    inputs = bases.LINEAR.inputs(3)
    with DoraCaching():
        before = run(model, inputs)
        changed(layer.base.weight)
        layer.kept = None
        after = run(model, inputs)
        measured = count_measures(monkeypatch)
        changed(layer.base.weight)  # which is why one has to ask for it
        run(model, inputs)
        assert differ(after, before) and not measured
        with DoraCaching(enabled=False):
            run(model, inputs)
            assert len(measured) == 1
        for tensor in (layer.a, layer.b, layer.base.weight):
            with torch.no_grad():
                tensor.mul_(1.25)
            run(model, inputs)
        assert len(measured) == 4
    assert not DoraCaching.on


# -- MontecloraTrainerMixin


class _Trainer:
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = torch.tensor(float(kwargs.get("times", 1)))
        return (loss, "output") if return_outputs else loss


class _Ours(MontecloraTrainerMixin, _Trainer):
    pass


class _Theirs(peft.helpers.MontecloraTrainerMixin, _Trainer):
    pass


class _Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_trainer_adds_the_penalties_in_training(wrapped: bool) -> None:
    losses = []
    for library, trainer in ((peft, _Theirs()), (splice, _Ours())):
        config = library.LoraConfig(r=2, target_modules=["first"], monteclora_config=library.MontecloraConfig())
        model = made(library, bases.LINEAR.build(), config).train()
        around = _Wrapped(model).train() if wrapped else model
        found, output = trainer.compute_loss(around, {}, return_outputs=True, times=2)
        assert output == "output"
        losses.append(found.detach())
        assert found != 2
        assert trainer.compute_loss(around.eval(), {}) == 1
        assert trainer.compute_loss(nn.Linear(2, 2), {}) == 1
    assert_close(losses[1], losses[0])


# -- KappaTune


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(3, 4, 6))
        self.other = nn.Parameter(torch.randn(3, 4, 4))


def _network() -> nn.Module:
    torch.manual_seed(0)
    layers = {f"layer{n}": nn.Linear(4 + n, 6) for n in range(6)}
    return nn.ModuleDict({**layers, "experts": _Experts(), "norm": nn.LayerNorm(6), "large": nn.Linear(40, 4)})


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_p": 0.01}, {"max_dim_size_to_analyze": 5}])
def test_kappa_targets_are_the_reference_s(options: dict[str, Any]) -> None:
    found = splice.find_kappa_target_modules(_network(), show_progress=False, **options)
    assert found == peft.helpers.find_kappa_target_modules(_network(), show_progress=False, **options)


def test_the_selector_chooses_as_the_reference_s() -> None:
    ours, theirs = (cls(_network(), show_progress=False) for cls in (KappaTuneSelector, peft.helpers.KappaTuneSelector))
    for options in ({}, {"num_modules": 3}, {"threshold": 20.0}, {"top_p": 0.5, "num_modules": 2}):
        assert ours.get_best_targets(**options) == theirs.get_best_targets(**options)
        assert ours.get_best_target_parameters(**options) == theirs.get_best_target_parameters(**options)


def test_it_is_read_through_the_class_that_knows_the_weight() -> None:
    """Codes have no condition number: such a layer is left out, and not measured as if they were values."""
    network = nn.ModuleDict({"plain": nn.Linear(4, 4), "codes": nn.Linear(4, 4)})
    codes = torch.randint(0, 100, (4, 4), dtype=torch.uint8)
    network["codes"].weight = nn.Parameter(codes, requires_grad=False)  # type: ignore[union-attr]
    found = splice.find_kappa_target_modules(network, top_p=1.0, show_progress=False)
    assert found == {"target_modules": ["plain"], "target_parameters": None}


# -- AdaLoRA's allocator


def _adalora(library: Any) -> Any:
    options = {"total_step": 10, "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 2, "deltaT": 2}
    return made(library, bases.LINEAR.build(), library.AdaLoraConfig(target_modules=["first", "second"], **options))


def test_the_allocator_does_what_the_reference_s_does() -> None:
    steps = []
    for library in (peft, splice):
        model = _adalora(library).train()
        allocator = model.base_model.rankallocator
        told: list[object] = [allocator.init_bgt, allocator.target_bgt, allocator.adapter_name, allocator.beta1]
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_" in name:
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
        for step in range(9):
            model(**bases.LINEAR.inputs(3)).square().sum().backward()
            told += [allocator.budget_schedule(step), allocator.update_and_allocate(model.base_model, step)]
            model.zero_grad()
        told.append(sorted(allocator.exp_avg_ipt))
        pattern = {f"model.{name}.lora_E": [True, False, True, False] for name in ("first", "second")}
        allocator.mask_using_rank_pattern(model.base_model, pattern)
        told.append([(p == 0).flatten().tolist() for n, p in sorted(model.named_parameters()) if "lora_E" in n])
        told.append(allocator.mask_to_budget(model.base_model, 3))
        allocator.reset_ipt()
        allocator.set_total_step(20)
        steps.append([*told, allocator.exp_avg_ipt, model.peft_config["default"].total_step])
        assert model.base_model.trainable_adapter_name == "default"
    assert steps[1] == steps[0]


def test_it_can_be_imported_under_its_name() -> None:
    from splice.kinds.registry import all_methods

    allocator = _adalora(splice).base_model.rankallocator
    assert type(allocator) is all_methods()[splice.PeftType.ADALORA].names["RankAllocator"]


# -- subtract_mutated_init


def test_what_the_start_took_out_of_the_base_is_subtracted(tmp_path: Path) -> None:
    found = []
    config = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    made(peft, bases.LINEAR.build(), config).save_pretrained(str(tmp_path))
    for library in (peft, splice):
        start = library.PeftModel.from_pretrained(bases.LINEAR.build(), str(tmp_path), is_trainable=True)
        with torch.no_grad():
            for name, parameter in start.named_parameters():
                if "lora_" in name:
                    parameter += 0.5
        trained = {k: t.clone() for k, t in library.get_peft_model_state_dict(start).items()}
        start.load_adapter(str(tmp_path), "initial")
        found.append(start.base_model.subtract_mutated_init(trained, "initial", {}))
    assert found[1].keys() == found[0].keys()
    for key, tensor in found[1].items():
        assert_close(tensor, found[0][key])
    with pytest.raises(ValueError, match="Adapter 'other' not found"):
        start.base_model.subtract_mutated_init(trained, "other")
