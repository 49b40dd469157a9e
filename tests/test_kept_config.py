"""New weights for an adapter that is there: it keeps its config, and says so where the checkpoint's computes something else.

The reference keeps it too, and says nothing.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import splice
from splice.checkpoint.types import PeftType
from tests import bases
from tests.bases import Base, run
from tests.comparing import differ
from tests.samples import SAMPLES, Case, network_cases, plain_cases
from tests.test_lora_inits import TAKING
from tests.test_lora_variants import VARIANTS

KEEPS = "keeps its own config, and that of the checkpoint differs: "
MORE: dict[PeftType, dict[str, dict[str, Any]]] = {
    PeftType.LORA: {
        **{name: dict(fields) for name, fields in TAKING.items()},
        **{name: fields for name, (fields, on) in VARIANTS.items() if name.startswith(("velora", "monteclora"))},
        "alpha": {"lora_alpha": 60},
        "one alpha": {"alpha_pattern": {"first": 60}},
        "dropout": {"lora_dropout": 0.5},
        "the same in patterns": {"r": 3, "lora_alpha": 2, "rank_pattern": {".*": 4}, "alpha_pattern": {".*": 6}},
    },
    PeftType.FOURIERFT: {"seed": {"random_loc_seed": 5}, "scale": {"scaling": 2.0}},
    PeftType.LOHA: {"alpha": {"alpha": 60}, "one alpha": {"alpha_pattern": {"first": 60}}},
    PeftType.LOKR: {"alpha": {"alpha": 60}, "one alpha": {"alpha_pattern": {"first": 60}}},
    PeftType.ADALORA: {"alpha": {"lora_alpha": 60}},
    PeftType.VERA: {"seed": {"projection_prng_key": 7}, "start": {"d_initial": 0.9}},
    PeftType.IA3: {"inputs": {"feedforward_modules": ["first"]}},
}


def cases() -> list[Any]:
    """Every method with every way to be something else than its plain config, each as the first and as the second."""
    found = []
    for case in [*plain_cases(bases.LINEAR), *network_cases(bases.LLAMA)]:
        options = {**SAMPLES[case.method.name].options, **MORE.get(case.method.name, {}), "same": {}}
        for name, fields in options.items():
            both = ({}, dict(fields))
            for one, other in (both, both[::-1]) if fields else (both,):
                found.append(
                    pytest.param(case, one, other, id=f"{case}-{name}-{'later' if fields is not one else 'first'}")
                )
    return found


@pytest.mark.parametrize(("case", "one", "other"), cases())
def test_what_comes_of_it_is_right_or_said_or_refused(
    case: Case, one: dict[str, Any], other: dict[str, Any], shared_checkpoint: Any
) -> None:
    base: Base = case.base
    folders = [shared_checkpoint(base, case.config(**fields), seed=seed) for seed, fields in enumerate((one, other))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = splice.PeftModel.from_pretrained(base.build(), folders[0])
        expected = run(splice.PeftModel.from_pretrained(base.build(), folders[1]), base.inputs(3))
    before = run(model, base.inputs(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model.load_adapter(folders[1], "default")
        except splice.AdapterMismatchError:
            assert torch.equal(run(model, base.inputs(3)), before)
            return
    said = [str(warning.message) for warning in caught if KEEPS in str(warning.message)]
    assert bool(said) == differ(run(model, base.inputs(3)), expected), said


def test_the_warning_names_both_values_and_the_way_out(shared_checkpoint: Any) -> None:
    base = bases.LINEAR
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": list(base.targets)}
    model = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, fields))
    folder = shared_checkpoint(base, {**fields, "use_rslora": True, "alpha_pattern": {"second": 3}}, seed=1)
    told = f"'default': it {KEEPS}use_rslora is True there and False here; lora_alpha of 'second' is 3 there and 6 here"
    with pytest.warns(splice.PeftWarning, match=told):
        model.load_adapter(folder, "default")
    model.delete_adapter("default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(folder, "default")
        model.set_adapter("default")
        model.load_adapter(folder, "default")
    again = splice.PeftModel.from_pretrained(base.build(), folder)
    assert torch.equal(run(model, base.inputs(3)), run(again, base.inputs(3)))
