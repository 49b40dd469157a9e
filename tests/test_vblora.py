"""VB-LoRA's checkpoints with the largest logits alone: what they hold, what they give, and that nobody trains from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import splice
from tests import bases
from tests.bases import Base, run
from tests.broken import unchanged
from tests.comparing import assert_close, load_both, tensors_in

FIELDS = {
    "peft_type": "VBLORA",
    "r": 3,
    "vector_length": 2,
    "init_vector_bank_bound": 0.8,
    "save_only_topk_weights": True,
}
LARGEST = {
    "three": {**FIELDS, "num_vectors": 10, "topk": 3},
    "one alone": {**FIELDS, "num_vectors": 300, "topk": 1},
    "of many": {**FIELDS, "num_vectors": 300, "topk": 2},
}
each = pytest.mark.parametrize("what", LARGEST)
few = pytest.mark.parametrize("base", [bases.LINEAR, bases.GPT2], ids=str)


def fields(base: Base, what: str) -> dict[str, Any]:
    return {**LARGEST[what], "target_modules": list(base.targets), "task_type": base.task}


@each
@few
def test_a_load_and_a_save(what: str, base: Base, shared_checkpoint: Any, tmp_path: Path) -> None:
    folder = shared_checkpoint(base, fields(base, what))
    pair = load_both(base, folder)
    expected = pair.assert_equal()
    assert pair.ours.load_report.placed == pair.ours.load_report.expected == len(tensors_in(folder))
    pair.ours.save_pretrained(tmp_path)
    saved, written = tensors_in(tmp_path), tensors_in(folder)
    assert saved.keys() == written.keys()
    for name, tensor in written.items():
        assert saved[name].dtype == tensor.dtype, name
        assert_close(saved[name], tensor)
    again = splice.PeftModel.from_pretrained(base.build(), tmp_path)
    assert_close(run(again, base.inputs(3)), expected)
    again.load_adapter(folder, "default")
    assert_close(run(again, base.inputs(3)), expected)


@each
def test_merged_and_from_a_state_dict(what: str, shared_checkpoint: Any, tmp_path: Path) -> None:
    base = bases.LINEAR
    model = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, fields(base, what)))
    expected = run(model, base.inputs(3))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    again = splice.PeftModel.from_pretrained(base.build(), tmp_path)
    assert_close(run(again, base.inputs(3)), expected)
    model.merge_adapter()
    assert_close(run(model, base.inputs(3)), expected)


def test_weights_that_add_up_to_more_than_one(shared_checkpoint: Any, tmp_path: Path) -> None:
    """By rounding: of the last vector nothing is left, and in the reference no number either."""
    base = bases.LINEAR
    folder = shared_checkpoint(base, fields(base, "three"))
    tensors = tensors_in(folder)
    for name, tensor in tensors.items():
        if name.endswith("_topk_weights"):
            tensors[name] = torch.full_like(tensor, 0.5000001)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    model = splice.PeftModel.from_pretrained(base.build(), tmp_path)
    assert run(model, base.inputs(3)).isfinite().all()


def test_training_from_it_is_refused(shared_checkpoint: Any) -> None:
    base = bases.LINEAR
    folder = shared_checkpoint(base, fields(base, "three"))
    model = splice.PeftModel.from_pretrained(base.build(), folder, is_trainable=True).train()
    with pytest.raises(RuntimeError, match="`save_only_topk_weights`: of its logits only the largest are there"):
        model(**base.inputs(3))


def test_indices_beyond_the_bank_are_refused(shared_checkpoint: Any, tmp_path: Path) -> None:
    base = bases.LINEAR
    folder = shared_checkpoint(base, fields(base, "three"))
    tensors = tensors_in(folder)
    name = next(name for name in tensors if name.endswith("_topk_indices"))
    save_file({**tensors, name: tensors[name] + 20}, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    network = base.build()
    with unchanged(network), pytest.raises(splice.AdapterMismatchError, match="indices up to .*, and the bank has 10"):
        splice.PeftModel.from_pretrained(network, tmp_path)
