"""What is peculiar to OSF: the gradients that stay away from what is kept, its ranks and its targets."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from tests import bases
from tests.bases import run
from tests.comparing import assert_close, load_both

BASE = bases.LINEAR


def fields(**more: Any) -> dict[str, Any]:
    return {"peft_type": "OSF", "target_modules": ["first", "second"], "effective_rank": 2, **more}


def test_training_follows_the_reference(shared_checkpoint: Any) -> None:
    pair = load_both(BASE, shared_checkpoint(BASE, fields()), is_trainable=True)
    for model in (pair.reference, pair.ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(4):
            run_with_gradients(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(run(pair.ours, BASE.inputs(3)), run(pair.reference, BASE.inputs(3)), factor=10)


def run_with_gradients(model: Any) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    found: torch.Tensor = model(x=BASE.inputs(4)["x"].to(dtype)).square().sum()
    return found


@pytest.mark.parametrize("case", ["plain", "half", "copied", "low_cpu_mem_usage"])
def test_gradients_stay_away_from_what_is_kept(case: str, shared_checkpoint: Any) -> None:
    dtype = torch.bfloat16 if case == "half" else torch.float32
    options = {"low_cpu_mem_usage": True} if case == "low_cpu_mem_usage" else {}
    folder = shared_checkpoint(BASE, fields())
    model: Any = splice.PeftModel.from_pretrained(BASE.build(dtype), folder, is_trainable=True, **options)
    model = copy.deepcopy(model) if case == "copied" else model
    run_with_gradients(model).backward()
    for name in ("first", "second"):
        layer = model.get_base_model().get_submodule(name)
        u, _, v = torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)
        trained = layer.osf_svd_params["default"]
        assert trained["U_low"].grad.any()
        assert trained["V_low"].grad.any()
        size = trained["U_low"].grad.norm()
        assert (u[:, :2].T @ trained["U_low"].grad).norm() < size * (0.02 if case == "half" else 1e-5)
        assert (trained["V_low"].grad @ v[:2].T).norm() < trained["V_low"].grad.norm() * (
            0.02 if case == "half" else 1e-5
        )


def test_two_at_once_are_refused(shared_checkpoint: Any) -> None:
    folder = shared_checkpoint(BASE, fields())
    model: Any = splice.PeftModel.from_pretrained(BASE.build(), folder)
    model.load_adapter(folder, "other")
    with pytest.raises(ValueError, match=r"first.*both are the smaller singular values of the one weight"):
        model.base_model.set_adapter(["default", "other"])


def test_targets_that_are_not_linear_are_left_out() -> None:
    """With a word; where none is left it is refused."""
    network = nn.ModuleDict({"first": nn.Embedding(6, 8), "second": nn.Linear(8, 5)})
    with pytest.warns(UserWarning, match=r"OSF cannot be put on 1 target \(first\), and leaves them as they are"):
        model = splice.get_peft_model(network, splice.OSFConfig(target_modules=["first", "second"]))
    assert model.targeted_module_names == ["second"]
    with pytest.raises(
        ValueError, match=r"'transformer.h.0.attn.c_attn' is not supported: OSF cannot be put on a Conv1D"
    ):
        splice.get_peft_model(bases.GPT2.build(), splice.OSFConfig())


@pytest.mark.parametrize("rank", [None, 0.34, 0.5, 1.0, 1, 100])
def test_how_many_values_stay(rank: float | None) -> None:
    config = fields(effective_rank=rank)
    models = [lib.get_peft_model(BASE.build(), lib.get_peft_config(config)) for lib in (peft, splice)]
    shapes = [{n: p.shape for n, p in model.named_parameters() if "osf_svd" in n} for model in models]
    assert shapes[1] == shapes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"effective_rank": 0}, "first: `effective_rank` should be a positive integer value but the value passed is 0"),
        ({"effective_rank": 0.01}, "0.01 of 6 singular values"),
        ({"rank_pattern": {"fir": 0}}, "first: `effective_rank` should be a positive"),
        ({"effective_rank": "half"}, "`effective_rank` should be a whole number or a fraction but the value .* 'half'"),
    ],
)
def test_ranks_that_there_are_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        splice.get_peft_model(BASE.build(), splice.get_peft_config(fields(**changes)))
