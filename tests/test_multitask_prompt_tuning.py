"""Multitask prompt tuning: the tasks of the rows, the prompt of a decoder, and what a new adapter starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from tests import bases
from tests.bases import run
from tests.comparing import assert_close, differ, load_both
from tests.samples import Case, network_cases
from tests.task_bases import T5, answer, labels_for

CASE, TO_T5 = (
    next(case for case in network_cases(base) if case.method.name is splice.PeftType.MULTITASK_PROMPT_TUNING)
    for base in (bases.LLAMA, T5)
)


def test_a_row_gets_the_shared_tokens_times_the_matrix_of_its_task(shared_checkpoint: Any) -> None:
    model = splice.PeftModel.from_pretrained(bases.LLAMA.build(), shared_checkpoint(bases.LLAMA, CASE.config()))
    encoder = model.prompt_encoder["default"]
    prompt = model.get_prompt(2, task_ids=torch.tensor([1, 2]))
    expected = encoder.embedding.weight * (encoder.prefix_task_cols[1] @ encoder.prefix_task_rows[1])
    assert_close(prompt[0], expected)
    assert differ(prompt[1], expected)


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (None, "task_ids cannot be None"),
        (torch.tensor([0, 3]), r"from 0 to 2 \(`num_tasks`\), got \[0, 3\]"),
        (torch.tensor([[0], [1]]), r"integers \(batch\), got torch.int64 \(2, 1\)"),
        (torch.tensor([0, 1, 2]), "for 3 rows, and the batch has 2"),
    ],
)
def test_tasks_that_are_wrong(tasks: torch.Tensor | None, said: str, shared_checkpoint: Any) -> None:
    model = splice.PeftModel.from_pretrained(bases.LLAMA.build(), shared_checkpoint(bases.LLAMA, CASE.config()))
    inputs = {"input_ids": bases.LLAMA.inputs(2)["input_ids"], **({} if tasks is None else {"task_ids": tasks})}
    with pytest.raises(ValueError, match=said):
        run(model, inputs)
    with pytest.raises(ValueError, match=said):
        model.generate(**inputs, max_new_tokens=1)


def test_the_network_may_be_called_itself(shared_checkpoint: Any) -> None:
    model = splice.PeftModel.from_pretrained(bases.LLAMA.build(), shared_checkpoint(bases.LLAMA, CASE.config()))
    inputs = CASE.base.inputs(3)
    assert torch.equal(run(model.get_base_model(), inputs), run(model, inputs))


def test_a_decoder_gets_a_prompt_too(shared_checkpoint: Any) -> None:
    """With labels alone, as the reference can; with what the decoder gets given, the same."""
    pair = load_both(T5, shared_checkpoint(T5, TO_T5.config()))
    inputs = {**TO_T5.base.inputs(3), **labels_for(T5)}
    inputs.pop("decoder_input_ids")
    inputs["decoder_attention_mask"] = torch.ones_like(inputs["labels"])
    with torch.no_grad():
        ours, reference = pair.ours(**inputs), pair.reference(**inputs)
    assert_close(ours.logits, reference.logits)
    assert_close(ours.loss, reference.loss)
    assert ours.logits.shape[1] == inputs["labels"].shape[1] + 4
    given = T5.build().prepare_decoder_input_ids_from_labels(inputs["labels"])
    assert_close(answer(pair.ours, {**inputs, "decoder_input_ids": given}), ours.logits)


SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@pytest.mark.parametrize("init", SOURCES)
def test_a_new_one_starts_from_another(init: str, shared_checkpoint: Any, tmp_path: Path) -> None:
    """As in the reference; and what was saved loads where the source is not."""
    source = tmp_path / "source.safetensors"
    source.write_bytes((shared_checkpoint(bases.LLAMA, CASE.config()) / "adapter_model.safetensors").read_bytes())
    fields = {"num_tasks": 1, "prompt_tuning_init": init, "prompt_tuning_init_task": 2}
    tensors = []
    for library in (peft, splice):
        torch.manual_seed(3)
        config = library.get_peft_config(CASE.config(**fields, prompt_tuning_init_state_dict_path=str(source)))
        model = library.get_peft_model(bases.LLAMA.build(), config)
        tensors.append({name: p for name, p in model.named_parameters() if "prompt_encoder" in name})
    assert list(tensors[0]) == list(tensors[1])
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    model.save_pretrained(tmp_path / "saved")
    source.unlink()
    again = splice.PeftModel.from_pretrained(bases.LLAMA.build(), tmp_path / "saved")
    assert torch.equal(
        again.prompt_encoder["default"].prefix_task_cols, tensors[1]["prompt_encoder.default.prefix_task_cols"]
    )


def test_sources_that_are_wrong(shared_checkpoint: Any) -> None:
    path = str(shared_checkpoint(bases.LLAMA, CASE.config()) / "adapter_model.safetensors")
    other = str(
        shared_checkpoint(
            bases.LLAMA, {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
        )
        / "adapter_model.safetensors"
    )
    for fields, said in (
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "prompt_tuning_init_state_dict_path needs to be specified with"),
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": path}, r"needs \(3, 4, 2\)"),
        (
            {"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "prompt_tuning_init_state_dict_path": other},
            "it has no prefix_task_cols",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            splice.get_peft_model(bases.LLAMA.build(), splice.get_peft_config(CASE.config(**fields)))


def test_rows_of_two_adapters(shared_checkpoint: Any) -> None:
    case: Case = CASE
    model = splice.PeftModel.from_pretrained(bases.LLAMA.build(), shared_checkpoint(bases.LLAMA, case.config()))
    model.load_adapter(shared_checkpoint(bases.LLAMA, case.config(), seed=1), "second")
    inputs, names = case.base.inputs(3), ["second", "default", "second"]
    alone = {}
    for name in ("second", "default"):
        model.set_adapter(name)
        alone[name] = run(model, inputs)
    mixed = run(model, inputs, adapter_names=names)
    assert_close(mixed, torch.stack([alone[name][row] for row, name in enumerate(names)]))
