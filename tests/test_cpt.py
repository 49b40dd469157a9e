"""Context-aware prompt tuning: radii of the steps, which tokens stay, and the loss that counts examples too."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import splice
from tests import bases
from tests.bases import generator, run
from tests.comparing import assert_close
from tests.samples import SAMPLES

FIELDS = {"peft_type": "CPT", "task_type": "CAUSAL_LM", **SAMPLES[splice.PeftType.CPT].config}
TWO_EXAMPLES = {
    **FIELDS,
    "cpt_token_ids": list(range(3, 13)),
    "cpt_tokens_type_mask": [1, 2, 3, 4, 4, 0, 5, 6, 7, 8],
    "cpt_mask": [1] * 10,
    "opt_projection_format_epsilon": 0.2,
}


def both(fields: dict[str, Any], name: str = "default", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """New adapters of both libraries with the same steps."""
    models = []
    for library in (peft, splice):
        model = library.get_peft_model(bases.LLAMA.build(dtype), library.get_peft_config(fields), name)
        step = model.prompt_encoder[name].delta_embedding.weight
        step.data.copy_(torch.randn(step.shape, generator=generator(1)) * 0.1)
        step.data[0] *= 1e-3
        models.append(model)
    return models[0], models[1]


def test_steps_are_brought_back_to_their_radii() -> None:
    """And those of labels, and of tokens to be ignored, get no gradient."""
    inputs = bases.LLAMA.inputs(2)
    steps, gradients = [], []
    for model in both(TWO_EXAMPLES):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        step = model.prompt_encoder["default"].delta_embedding.weight
        steps.append(step.detach().clone())
        gradients.append(step.grad)
    assert_close(steps[1], steps[0])
    assert_close(gradients[1], gradients[0])
    norms = steps[1].norm(dim=1)
    assert norms[1] == pytest.approx(0.1 * (16 / 2048) ** 0.5, rel=1e-4)
    assert norms[2] == pytest.approx(0.2 * (16 / 2048) ** 0.5, rel=1e-4)
    assert (norms[[3, 4, 5, 9]] < 1e-9).all()
    assert (gradients[1][[3, 4, 5, 9]] == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    types=st.lists(st.integers(0, 8), min_size=4, max_size=4),
    rows=st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=2, max_size=2) | st.none(),
    decay=st.sampled_from([None, 1.0, 0.5]),
    masked=st.booleans(),
)
def test_the_loss_is_that_of_the_reference(
    types: list[int], rows: list[list[int]] | None, decay: float | None, masked: bool
) -> None:
    fields = {**FIELDS, "cpt_token_ids": [3, 4, 5, 6], "cpt_tokens_type_mask": types, "cpt_mask": [1] * 4}
    if decay is not None:
        fields |= {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": decay}
    inputs = bases.LLAMA.inputs(2)
    labels = inputs["input_ids"].clone()
    labels[1, :2] = -100 if masked else labels[1, :2]
    reference, ours = both(fields)
    more = {} if rows is None else {"input_type_mask": torch.tensor(rows)}
    with torch.no_grad():
        # It changes the mask that it is given.
        expected = reference(**inputs, labels=labels, **{name: mask.clone() for name, mask in more.items()})
        output = ours(**inputs, labels=labels, **more)
        as_tuple = ours(**inputs, labels=labels, **more, return_dict=False)
    torch.testing.assert_close(output.loss, expected.loss, equal_nan=True)
    torch.testing.assert_close(as_tuple[0], output.loss, equal_nan=True)
    assert_close(output.logits, expected.logits)
    assert not more or more["input_type_mask"].tolist() == rows


def test_half_precision() -> None:
    inputs = bases.LLAMA.inputs(2)
    reference, ours = both(TWO_EXAMPLES, dtype=torch.bfloat16)
    with torch.no_grad():
        losses = [model(**inputs, labels=inputs["input_ids"]).loss.float() for model in (ours, reference)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-2)


def test_an_adapter_of_any_name() -> None:
    """The reference looks for the config of "default"."""
    inputs = bases.LLAMA.inputs(2)
    losses = [both(TWO_EXAMPLES, name)[1](**inputs, labels=inputs["input_ids"]).loss for name in ("default", "mine")]
    assert losses[0] == losses[1]


def test_rows_of_two_adapters_and_none(shared_checkpoint: Any) -> None:
    """Each row's loss is what its own adapter gives, weighted with the number of labels that it counts."""
    folders = [shared_checkpoint(bases.LLAMA, TWO_EXAMPLES), shared_checkpoint(bases.LLAMA, FIELDS, seed=1)]
    model = splice.PeftModel.from_pretrained(bases.LLAMA.build(), folders[0])
    model.load_adapter(folders[1], "second")
    inputs = bases.LLAMA.inputs(3)
    inputs["labels"], names = inputs["input_ids"], ["second", "default", "__base__"]
    total, count = 0.0, 0
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        with torch.no_grad():
            if name == "__base__":
                with model.disable_adapter():
                    loss = model(**one).loss
                labels = 5
            else:
                model.set_adapter(name)
                loss = model(**one).loss
                labels = 6 + sum(t > 0 and t % 4 == 0 for t in model.peft_config[name].cpt_tokens_type_mask)
        total, count = total + loss.item() * labels, count + labels
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).loss
    assert mixed.item() == pytest.approx(total / count, rel=1e-4)


def test_configs_that_are_wrong() -> None:
    for fields, said in (
        ({"task_type": "SEQ_CLS"}, "only supports task_type = CAUSAL_LM"),
        ({"cpt_mask": [1]}, "must have the same length"),
        ({"cpt_token_ids": []}, "must have the same length"),
    ):
        for library in (peft, splice):
            with pytest.raises(ValueError, match=said):
                library.get_peft_config({**FIELDS, **fields})
    with pytest.raises(ValueError, match="`opt_weighted_loss_type` must be 'none' or 'decay', got 'decayed'"):
        splice.get_peft_model(
            bases.LLAMA.build(), splice.get_peft_config({**FIELDS, "opt_weighted_loss_type": "decayed"})
        )
    model = splice.get_peft_model(bases.LLAMA.build(), splice.get_peft_config(FIELDS))
    inputs = bases.LLAMA.inputs(2)
    with pytest.raises(ValueError, match=r"`input_type_mask` \(2, 1\) and `labels` \(2, 6\) must have one shape"):
        run(model, {**inputs, "labels": inputs["input_ids"], "input_type_mask": torch.ones(2, 1)})
