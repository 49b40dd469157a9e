"""What is peculiar to methods that update a weight as a whole: HiRA, DeLoRA, DEFT, PEANuT, PSOFT; LoHa and LoKr."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from tests import bases
from tests.bases import run
from tests.comparing import assert_close, differ, load_both

BASE = bases.LINEAR


def fields(peft_type: str, **more: Any) -> dict[str, Any]:
    return {"peft_type": peft_type, "target_modules": ["first", "second"], **more}


def new(library: Any, config: dict[str, Any], network: nn.Module | None = None) -> Any:
    return library.get_peft_model(BASE.build() if network is None else network, library.get_peft_config(config))


def random(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)


# -- HiRA


def test_hira_reads_ranks_as_the_tensors_have_them(checkpoint: Any, tmp_path: Path) -> None:
    """The reference ignores `rank_pattern` on the first adapter of a layer, and follows it on the next."""
    config = fields("HIRA", r=4, rank_pattern={"first": 2})
    pair = load_both(BASE, checkpoint(BASE, config))
    pair.assert_equal()
    assert any("`rank_pattern` was not followed" in note for note in pair.ours.load_report.notes)
    second = new(peft, fields("HIRA", r=3))
    second.add_adapter("second", peft.get_peft_config(config))
    second.set_adapter("second")
    random(second)
    second.save_pretrained(str(tmp_path), selected_adapters=["second"])
    ours = splice.PeftModel.from_pretrained(BASE.build(), tmp_path / "second")
    assert ours.get_base_model().first.hira_A["default"].shape == (2, 6)
    assert_close(run(ours, BASE.inputs(3)), run(second.eval(), BASE.inputs(3)))


def test_a_new_hira_adapter_follows_its_pattern() -> None:
    model = new(splice, fields("HIRA", r=4, rank_pattern={"first": 2}))
    assert model.get_base_model().first.hira_A["default"].shape == (2, 6)
    assert model.get_base_model().second.hira_A["default"].shape == (4, 8)


def test_hira_on_a_kernel_of_one_place_on_two_axes() -> None:
    """Merged is unmerged; the reference fails."""
    network = nn.Sequential(nn.Conv3d(2, 3, (1, 1, 2)))
    model = new(splice, fields("HIRA", r=2, target_modules=["0"], init_weights=False), network)
    x = torch.randn(2, 2, 3, 3, 4)
    before = model(x)
    model.merge_adapter()
    assert_close(model(x), before)


def test_hira_refuses_groups_and_unknown_starts() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(NotImplementedError, match=r"^0: HiRA is not defined on a convolution with groups \(here 2\)"):
        new(splice, fields("HIRA", target_modules=["0"]), network)
    with pytest.raises(ValueError, match="Unknown initialization init_weights='olora'"):
        new(splice, fields("HIRA", init_weights="olora"))


# -- DeLoRA


def test_delora_measures_the_base_and_not_what_is_merged() -> None:
    model = new(splice, fields("DELORA", r=2, init_weights=False))
    expected = model.get_base_model().first.delora_w_norm["default"].clone()
    model.merge_adapter()
    model.add_adapter("other", splice.DeloraConfig(r=2, target_modules=["first"]))
    assert torch.equal(model.get_base_model().first.delora_w_norm["other"], expected)


def test_a_row_of_a_counts_by_its_direction() -> None:
    model = new(splice, fields("DELORA", r=2, init_weights=False)).eval()
    before = run(model, BASE.inputs(2))
    with torch.no_grad():
        model.get_base_model().first.delora_A["default"].mul_(3)
    assert_close(run(model, BASE.inputs(2)), before)


# -- DEFT


@pytest.mark.parametrize("form", ["relu", "qr"])
def test_a_new_deft_adapter_changes_nothing_and_para_does(form: str) -> None:
    plain = run(BASE.build(), BASE.inputs(3))
    assert_close(
        run(new(splice, fields("DEFT", r=3, alpha=5, decomposition_method=form)).eval(), BASE.inputs(3)), plain
    )
    assert differ(
        run(new(splice, fields("DEFT", r=3, para=True, decomposition_method="qr")).eval(), BASE.inputs(3)), plain
    )


def test_what_another_adapter_adds_is_not_taken_out(checkpoint: Any) -> None:
    """Two DEFT adapters give the sum of what each gives, whichever of them is merged."""
    folders = [checkpoint(BASE, fields("DEFT", r=2), name=str(seed), seed=seed) for seed in (0, 1)]
    pair = load_both(BASE, *folders)
    pair.each(lambda model: model.base_model.set_adapter(["default", "second"]))
    expected = pair.assert_equal()
    for name in ("default", "second"):
        model = copy.deepcopy(pair.ours)
        model.merge_adapter(adapter_names=[name])
        assert_close(run(model, BASE.inputs(3)), expected)


def test_a_checkpoint_of_para_is_none_of_deft(checkpoint: Any) -> None:
    folder = checkpoint(BASE, fields("DEFT", r=2, para=True))
    config = splice.DeftConfig(r=2, target_modules=["first", "second"])
    with pytest.raises(splice.AdapterMismatchError, match="deft_R"):
        splice.PeftModel.from_pretrained(BASE.build(), folder, config=config)


def test_a_form_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="Unknown `decomposition_method` 'svd': it is 'relu' or 'qr'"):
        splice.DeftConfig(decomposition_method="svd")  # type: ignore[arg-type]


# -- PEANuT


def test_peanut_knows_the_activations_of_transformers() -> None:
    for name in ("relu", "gelu_pytorch_tanh", "silu"):
        models = [new(library, fields("PEANUT", r=3, depth=1, act_fn=name)).eval() for library in (peft, splice)]
        random(models[0])
        tensors = peft.get_peft_model_state_dict(models[0])
        splice.set_peft_model_state_dict(models[1], tensors)
        assert_close(run(models[1], BASE.inputs(3)), run(models[0], BASE.inputs(3)))
    with pytest.raises(ValueError, match="Unknown `act_fn` 'nothing'"):
        new(splice, fields("PEANUT", act_fn="nothing"))
    with pytest.raises(ValueError, match="`depth` should be a whole number of at least 0"):
        new(splice, fields("PEANUT", depth=-1))


# -- what is worked out of the weight once


WORKED_OUT = {"PSOFT": {"r": 3}, "OSF": {"effective_rank": 2}, "ADAMSS": {"r": 3, "num_subspaces": 2}}
worked_out = pytest.mark.parametrize("peft_type", WORKED_OUT)


@worked_out
def test_it_is_worked_out_of_the_base_and_not_of_what_is_merged(peft_type: str, checkpoint: Any) -> None:
    config = fields(peft_type, **WORKED_OUT[peft_type])
    folder = checkpoint(BASE, config)
    model: Any = splice.PeftModel.from_pretrained(BASE.build(), checkpoint(BASE, config, name="first", seed=1))
    model.merge_adapter()
    model.load_adapter(folder, "other")
    model.unmerge_adapter()
    model.set_adapter("other")
    alone = splice.PeftModel.from_pretrained(BASE.build(), folder)
    assert torch.equal(run(model, BASE.inputs(3)), run(alone, BASE.inputs(3)))


@worked_out
def test_a_base_that_gets_its_values_later(peft_type: str, checkpoint: Any) -> None:
    folder = checkpoint(BASE, fields(peft_type, **WORKED_OUT[peft_type]))
    whole: Any = splice.PeftModel.from_pretrained(BASE.build(), folder)
    empty: Any = splice.PeftModel.from_pretrained(BASE.build().to("meta"), folder)
    empty.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(run(empty, BASE.inputs(3)), run(whole, BASE.inputs(3)))


def test_psoft_refuses_what_it_cannot_decompose() -> None:
    with pytest.raises(ValueError, match=r"first: `r` \(9\) must be at most 6"):
        new(splice, fields("PSOFT", r=9))
    with pytest.raises(
        TypeError, match="first: PSOFT requires a weight in float32, float16 or bfloat16.*in torch.float64"
    ):
        new(splice, fields("PSOFT", r=2), BASE.build(torch.float64))
    with pytest.raises(ValueError, match="`psoft_alpha` should not be 0"):
        new(splice, fields("PSOFT", r=2, psoft_alpha=0))
    with pytest.raises(ValueError, match=r"`psoft_svd` must be one of \['full', 'lowrank'\]; got 'x'"):
        splice.PsoftConfig(psoft_svd="x")  # type: ignore[arg-type]


def test_alpha_of_psoft_changes_nothing(checkpoint: Any) -> None:
    folder = checkpoint(BASE, fields("PSOFT", r=3))
    config = splice.PsoftConfig(r=3, target_modules=["first", "second"], psoft_alpha=5)
    models = [splice.PeftModel.from_pretrained(BASE.build(), folder, config=c) for c in (None, config)]
    assert_close(run(models[1], BASE.inputs(3)), run(models[0], BASE.inputs(3)))


@pytest.mark.parametrize(
    "config",
    [
        splice.LoHaConfig(r=3, target_modules=["0"], init_weights=False),
        splice.LoKrConfig(r=2, target_modules=["0"], init_weights=False),
        splice.LoKrConfig(r=1, target_modules=["0"], init_weights=False, decompose_both=True, decompose_factor=4),
    ],
    ids=["LOHA", "LOKR", "LOKR of four factors"],
)
@pytest.mark.parametrize("shape", [(24,), (1, 24), (0, 24), (2, 3, 24), (50, 24)], ids=str)
def test_few_tokens_go_through_the_factors(config: Any, shape: tuple[int, ...]) -> None:
    """And give what the update as a whole gives, to the gradients; what is dropped in training is dropped of the whole."""
    torch.manual_seed(0)
    model: Any = splice.get_peft_model(nn.Sequential(nn.Linear(24, 20)), config)
    layer = model.base_model.model[0].splice_host.layers["default"]
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(shape, requires_grad=True)
    found, expected = layer.delta(x), nn.functional.linear(x, layer.update())
    assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, [x, *trained], weights, retain_graph=True) for y in (found, expected)]
    for one, other in zip(*gradients):
        assert_close(one, other, factor=5)
    layer.rank_dropout, layer.dropout_keeps_mean = 1.0, False
    assert not layer.delta(x).any()
