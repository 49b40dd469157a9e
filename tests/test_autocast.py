"""What is kept between calls does not depend on the mode that the first of them came in."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import splice
from tests import bases
from tests.bases import run
from tests.samples import Case, plain_cases

MODES: dict[str, Any] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": lambda: torch.inference_mode(),
}
CASES = [
    Case(case.method, case.base, option)
    for case in plain_cases(bases.LINEAR, bases.LLAMA)
    for option in ("", *(o for o in case.sample.options if case.base.name not in case.sample.not_on.get(o, ())))
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_first_call_inside_changes_no_later_one(case: Case, mode: str, shared_checkpoint: Any) -> None:
    checkpoint, inputs = shared_checkpoint(case.base, case.config()), case.base.inputs(3)
    outputs = []
    for first in (contextlib.nullcontext, MODES[mode]):
        torch.manual_seed(0)
        with first():
            model: Any = splice.PeftModel.from_pretrained(case.base.build(), checkpoint).eval()
            model(**inputs, **case.sample.call)
        outputs.append(run(model, inputs, **case.sample.call))
    assert torch.equal(*outputs)
