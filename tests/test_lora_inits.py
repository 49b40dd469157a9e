"""Initialisations of LoRA that take something out of the base weight: the same output, and a base that stays whole."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from splice.errors import PeftWarning, UnsupportedFeatureError
from tests import bases
from tests.bases import Base, run
from tests.comparing import (
    Snapshot,
    assert_close,
    config_in,
    differ,
    load_both,
    named,
    parameters_of,
    state_of,
    tensors_in,
    trainable_names,
)

TAKING = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-patterns": {"init_lora_weights": "pissa", "alpha_pattern": {"second": 3}, "rank_pattern": {"second": 2}},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True},
    "olora": {"init_lora_weights": "olora", "use_rslora": True},
}
taking = pytest.mark.parametrize("option", TAKING)
on_both = pytest.mark.parametrize("base", [bases.LINEAR, bases.TRANSPOSED], ids=str)


def config(base: Base, **changes: Any) -> dict[str, Any]:
    targets = {"target_modules": list(base.targets), "task_type": base.task}
    return {"peft_type": "LORA", "r": 3, "lora_alpha": 6, **targets, **changes}


def cases() -> list[Any]:
    return [
        pytest.param(base, fields, id=f"{base}-{name}")
        for base in (bases.LINEAR, bases.TRANSPOSED)
        for name, fields in TAKING.items()
        if (base, name) != (bases.TRANSPOSED, "olora")
    ]


each = pytest.mark.parametrize(("base", "fields"), cases())


@each
def test_the_output_is_that_of_the_reference(base: Base, fields: dict[str, Any], shared_checkpoint: Any) -> None:
    pair = load_both(base, shared_checkpoint(base, config(base, **fields)), is_trainable=True)
    assert differ(pair.assert_equal(), run(base.build(), base.inputs(3)))
    assert parameters_of(pair.ours) == parameters_of(pair.reference)
    assert set(state_of(pair.ours)) == set(state_of(pair.reference))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@each
def test_training(base: Base, fields: dict[str, Any], dropout: float, shared_checkpoint: Any) -> None:
    """With dropout the base's part sees the input whole."""
    folder = shared_checkpoint(base, config(base, lora_dropout=dropout, **fields))
    pair = load_both(base, folder, is_trainable=True)
    found = []
    for model in (pair.reference, pair.ours):
        torch.manual_seed(3)
        model.train()(**base.inputs(3)).square().sum().backward()
        found.append({name: p.grad for name, p in named(model) if p.grad is not None})
    assert set(found[1]) == set(found[0]) == trainable_names(pair.ours)
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, factor=30)


@each
def test_the_base_stays_whole(base: Base, fields: dict[str, Any], shared_checkpoint: Any) -> None:
    network = base.build()
    before, output = Snapshot.of(network), run(network, base.inputs(3))
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(base, config(base, **fields)))
    adapted = run(model, base.inputs(3))
    with model.disable_adapter():
        assert torch.equal(run(model, base.inputs(3)), output)
    model.merge_adapter()
    assert_close(run(model, base.inputs(3)), adapted)
    model.unmerge_adapter()
    assert torch.equal(run(model, base.inputs(3)), adapted)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(clone, base.inputs(3)), adapted)
        assert_close(run(clone.merge_and_unload(), base.inputs(3)), adapted)
    model.unload()
    before.assert_same(network)


@each
def test_beside_another_adapter(base: Base, fields: dict[str, Any], shared_checkpoint: Any) -> None:
    """Its part is of the base's own weight, also while another adapter is merged; rows of one batch may differ."""
    plain = shared_checkpoint(base, config(base, lora_alpha=9), seed=1)
    folder, x = shared_checkpoint(base, config(base, **fields)), base.inputs(3)
    alone = [run(splice.PeftModel.from_pretrained(base.build(), f), x) for f in (plain, folder)]
    model = splice.PeftModel.from_pretrained(base.build(), plain)
    model.merge_adapter()
    model.load_adapter(folder, "second")
    model.unmerge_adapter()
    rows = run(model, x, adapter_names=["default", "second", "__base__"])
    for row, expected in enumerate([*alone, run(base.build(), x)]):
        assert_close(rows[row], expected[row])
    model.set_adapter("second")
    assert_close(run(model, x), alone[1])
    model.base_model.set_adapter(["default", "second"])
    both = run(model, x)
    model.merge_adapter()
    assert_close(run(model, x), both)


@each
def test_a_new_adapter_starts_at_the_base(base: Base, fields: dict[str, Any], tmp_path: Any) -> None:
    """Trained, saved and loaded again, it is the same."""
    made = [
        library.get_peft_model(base.build(), library.get_peft_config(config(base, **fields)))
        for library in (peft, splice)
    ]
    expected = run(base.build(), base.inputs(3))
    for model in made:
        assert_close(run(model, base.inputs(3)), expected)
    reference, ours = (dict(named(model)) for model in made)
    for a, b in ((n, n.replace("lora_A", "lora_B")) for n in ours if "lora_A" in n):
        assert_close(ours[b] @ ours[a], reference[b] @ reference[a], factor=3)
    with torch.no_grad():
        for name, parameter in made[1].named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if "lora" in name else 0.0)
    made[1].save_pretrained(tmp_path)
    trained = run(made[1], base.inputs(3))
    assert differ(trained, expected)
    pair = load_both(base, tmp_path)
    assert_close(pair.assert_equal(), trained)


def test_made_without_values(shared_checkpoint: Any) -> None:
    """The part of the base is worked out once there are values."""
    base, fields = bases.LINEAR, config(bases.LINEAR, **TAKING["pissa"])
    expected = run(splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, fields)), base.inputs(3))
    model = splice.get_peft_model(base.build(), splice.get_peft_config(fields), low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in model.named_parameters() if "lora" in n)
    loaded = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, fields))
    state = {n: t for n, t in loaded.state_dict().items() if "lora" in n}
    model.load_state_dict(state, strict=False, assign=True)
    assert_close(run(model, base.inputs(3)), expected)


def test_the_randomised_decomposition(tmp_path: Any) -> None:
    base, fields = bases.LINEAR, config(bases.LINEAR, init_lora_weights="pissa_niter_4")
    model = splice.get_peft_model(base.build(), splice.get_peft_config(fields))
    state = torch.random.get_rng_state()
    assert_close(run(model, base.inputs(3)), run(base.build(), base.inputs(3)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1) if parameter.requires_grad else None
    model.save_pretrained(tmp_path)
    with pytest.warns(PeftWarning, match="pissa_niter_4"):
        again = splice.PeftModel.from_pretrained(base.build(), tmp_path)
    assert torch.equal(run(again, base.inputs(3)), run(model, base.inputs(3)))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("init", ["orthogonal", "eva", "mica", "lora_ga"])
@on_both
def test_those_that_leave_the_base_alone(init: str, base: Base, shared_checkpoint: Any) -> None:
    folder = shared_checkpoint(base, config(base, r=4, init_lora_weights=init))
    reference = peft.PeftModel.from_pretrained(base.build(), folder)
    if init == "lora_ga":
        with pytest.warns(PeftWarning, match="saved after the initialisation"):
            ours = splice.PeftModel.from_pretrained(base.build(), folder)
    else:
        ours = splice.PeftModel.from_pretrained(base.build(), folder, is_trainable=True)
    assert_close(run(ours, base.inputs(3)), run(reference, base.inputs(3)))
    if init == "mica":
        trained = trainable_names(ours)
        assert trained
        assert all("lora_A" in name for name in trained)


@pytest.mark.parametrize("base", [bases.LINEAR, bases.TRANSPOSED, bases.EMBEDDING], ids=str)
def test_mica_starts_at_the_least_directions(base: Base) -> None:
    fields = config(base, init_lora_weights="mica")
    made = [library.get_peft_model(base.build(), library.get_peft_config(fields)) for library in (peft, splice)]
    assert_close(run(made[1], base.inputs(3)), run(base.build(), base.inputs(3)))
    for reference, ours in zip(*(_mica_factors(model) for model in made)):
        assert_close(ours @ ours.T, reference @ reference.T)
    assert trainable_names(made[1]) == trainable_names(made[0])
    made[1].set_adapter("default")
    assert trainable_names(made[1]) == trainable_names(made[0])


def _mica_factors(model: Any) -> list[torch.Tensor]:
    state = model.state_dict()
    return [state[name] for name in sorted(state) if "lora_B" in name or "lora_embedding_B" in name]


def test_an_orthogonal_start_computes_nothing_yet() -> None:
    base = bases.LINEAR
    fields = config(base, r=4, init_lora_weights="orthogonal")
    model = splice.get_peft_model(base.build(), splice.get_peft_config(fields))
    assert_close(run(model, base.inputs(3)), run(base.build(), base.inputs(3)))
    assert all(p.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("option", ["pissa", "olora"])
def test_half_precision(dtype: torch.dtype, option: str, shared_checkpoint: Any) -> None:
    base = bases.LINEAR
    pair = load_both(base, shared_checkpoint(base, config(base, **TAKING[option])), dtype=dtype)
    inputs = {"x": base.inputs(3)["x"].to(dtype)}
    assert_close(run(pair.ours, inputs), run(pair.reference, inputs))
    assert parameters_of(pair.ours) == parameters_of(pair.reference)


@pytest.mark.parametrize(
    ("base", "changes", "error", "message"),
    [
        (bases.LINEAR, {"init_lora_weights": "corda"}, UnsupportedFeatureError, "path_initial_model_for_weight_conv"),
        (bases.LINEAR, {"init_lora_weights": "lora_ga"}, UnsupportedFeatureError, "gradients"),
        (bases.LINEAR, {"init_lora_weights": "pisa"}, ValueError, "Unknown initialization"),
        (bases.LINEAR, {"init_lora_weights": "pissa", "r": 7}, ValueError, "first: .*takes 7 directions"),
        (bases.LINEAR, {"init_lora_weights": "orthogonal"}, ValueError, "even rank"),
        (bases.CONV2D, {"init_lora_weights": "pissa"}, ValueError, "CONV2D"),
        (bases.TRANSPOSED, {"init_lora_weights": "olora"}, ValueError, "olora"),
    ],
    ids=str,
)
def test_what_cannot_be_made(base: Base, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    network = base.build()
    before = Snapshot.of(network)
    with pytest.raises(error, match=message), pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        splice.get_peft_model(network, splice.get_peft_config(config(base, **changes)))
    before.assert_same(network)


@pytest.mark.parametrize("option", ["pissa", "olora"])
def test_saved_as_plain_lora(option: str, tmp_path: Path) -> None:
    """The same tensors and config as the reference writes, and the same output on the unchanged base."""
    base = bases.LINEAR
    model: Any = splice.get_peft_model(base.build(), splice.get_peft_config(config(base, **TAKING[option])))
    model.save_pretrained(tmp_path / "initial")
    train_a_little(model, base)
    expected = run(model.eval(), base.inputs(3))
    model.save_pretrained(tmp_path / "trained")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    theirs: Any = peft.PeftModel.from_pretrained(base.build(), str(tmp_path / "trained"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(
            str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    assert config_in(tmp_path / "plain") == config_in(tmp_path / "theirs")
    ours, reference = (tensors_in(tmp_path / name) for name in ("plain", "theirs"))
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        assert_close(ours[name], tensor, factor=10)
    again: Any = splice.PeftModel.from_pretrained(base.build(), tmp_path / "plain")
    assert_close(run(again, base.inputs(3)), expected, factor=10)
    with pytest.raises(ValueError, match="lacks .*lora_A.weight, so it is not this adapter"):
        other = splice.get_peft_model(base.build(), splice.LoraConfig(target_modules=["first"]))
        other.save_pretrained(tmp_path / "other")
        model.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=tmp_path / "other")


def train_a_little(model: Any, base: Base) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(**base.inputs(3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
