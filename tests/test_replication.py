"""Layers that are used several times: the output of the reference, and a base that comes back as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import splice
from splice.errors import AdapterMismatchError
from tests import bases
from tests.bases import Base, run
from tests.comparing import Snapshot, assert_close, differ, load_both, tensors_in, trainable_names

RANGES = [[0, 2], [1, 2]]
on_each = pytest.mark.parametrize("base", [bases.LLAMA, bases.GPT2, bases.BERT], ids=str)


def config(base: Base, **changes: Any) -> dict[str, Any]:
    named = {"target_modules": list(base.targets), "task_type": base.task}
    return {"peft_type": "LORA", "r": 3, **named, "layer_replication": RANGES, **changes}


@pytest.mark.parametrize("base", [bases.LLAMA], ids=str)
def test_the_output_is_that_of_the_reference(base: Base, shared_checkpoint: Any, tmp_path: Path) -> None:
    folder = shared_checkpoint(base, config(base))
    pair = load_both(base, folder, is_trainable=True)
    assert differ(pair.assert_equal(), run(base.build(), base.inputs(3)))
    assert trainable_names(pair.ours) == trainable_names(pair.reference)
    pair.ours.save_pretrained(tmp_path)
    assert set(tensors_in(tmp_path)) == set(tensors_in(folder))
    again: Any = splice.PeftModel.from_pretrained(base.build(), tmp_path)
    assert torch.equal(run(again, base.inputs(3)), run(pair.ours.eval(), base.inputs(3)))


@pytest.mark.parametrize("base", [bases.LLAMA], ids=str)
def test_generated_tokens(base: Base, shared_checkpoint: Any) -> None:
    pair = load_both(base, shared_checkpoint(base, config(base)))
    assert torch.equal(bases.generate(pair.ours, base), bases.generate(pair.reference, base))


@on_each
def test_unloaded_the_base_is_what_it_was(base: Base, tmp_path: Path) -> None:
    network = base.build()
    before, output = Snapshot.of(network), run(network, base.inputs(3))
    layers = network.config.num_hidden_layers
    model: Any = splice.get_peft_model(network, splice.get_peft_config(config(base, init_lora_weights=False)))
    assert network.config.num_hidden_layers == 3
    copied = copy.deepcopy(model)
    assert torch.equal(run(copied.eval(), base.inputs(3)), run(model.eval(), base.inputs(3)))
    assert model.unload() is network
    before.assert_same(network)
    assert network.config.num_hidden_layers == layers
    assert torch.equal(run(network, base.inputs(3)), output)


def test_merged_every_copy_has_a_weight_of_its_own() -> None:
    """The reference adds the updates of all copies to the one weight that they share."""
    base = bases.LLAMA
    model: Any = splice.get_peft_model(
        base.build(), splice.get_peft_config(config(base, init_lora_weights=False))
    ).eval()
    expected = run(model, base.inputs(3))
    model.merge_adapter()
    assert_close(run(model, base.inputs(3)), expected, factor=5)
    model.unmerge_adapter()
    assert torch.equal(run(model, base.inputs(3)), expected)
    merged = model.merge_and_unload()
    assert_close(run(merged, base.inputs(3)), expected, factor=5)
    assert len(merged.model.layers) == merged.config.num_hidden_layers == 3


def test_a_second_adapter(shared_checkpoint: Any) -> None:
    """For the same layers it stands beside the first, whose output does not change; for others it is refused."""
    base = bases.LLAMA
    model: Any = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, config(base)))
    before = run(model, base.inputs(3))
    model.load_adapter(shared_checkpoint(base, config(base), seed=1), "second")
    assert torch.equal(run(model, base.inputs(3)), before)
    with pytest.raises(
        ValueError, match=r"needs layer_replication=\[\[0, 1\]\].*it has layer_replication=\[\[0, 2\], \[1, 2\]\]"
    ):
        model.load_adapter(shared_checkpoint(base, config(base, layer_replication=[[0, 1]])), "third")
    plain: Any = splice.PeftModel.from_pretrained(
        base.build(), shared_checkpoint(base, config(base, layer_replication=None))
    )
    with pytest.raises(ValueError, match="it uses each layer once"):
        plain.load_adapter(shared_checkpoint(base, config(base)), "second")


def test_a_load_that_fails_leaves_the_layers_as_they_were(shared_checkpoint: Any, tmp_path: Path) -> None:
    base = bases.LLAMA
    network = base.build()
    before = Snapshot.of(network)
    made: Any = splice.get_peft_model(base.build(), splice.get_peft_config(config(base)))
    made.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace('"r": 3', '"r": 5'))
    with pytest.raises(AdapterMismatchError):
        splice.PeftModel.from_pretrained(network, tmp_path)
    before.assert_same(network)
    assert network.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("base", "ranges", "message"),
    [
        (bases.LLAMA, [[0, 3]], r"\[0, 3\] is no range of the 2 layers at 'model.layers'"),
        (bases.LLAMA, [[1, 1]], r"\[1, 1\] is no range"),
        (bases.LLAMA, [[1]], r"pairs \[start, end\], got \[1\]"),
        (bases.LINEAR, [[0, 1]], "needs a list of layers named `layers`, `h` or `bert.encoder.layer`; Net has none"),
    ],
    ids=str,
)
def test_ranges_that_are_none(base: Base, ranges: Any, message: str) -> None:
    network = base.build()
    before = Snapshot.of(network)
    with pytest.raises(ValueError, match=message):
        splice.get_peft_model(network, splice.get_peft_config(config(base, layer_replication=ranges)))
    before.assert_same(network)
