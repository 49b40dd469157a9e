"""What is particular to (IA)³: which layers scale their input follows from the config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import splice
from tests import bases
from tests.bases import run
from tests.comparing import assert_close, differ, load_both

BASE = bases.LINEAR


def ia3(**changes: Any) -> dict[str, Any]:
    return {"peft_type": "IA3", "target_modules": ["first", "second"], "feedforward_modules": ["second"], **changes}


def test_the_names_are_plain_suffixes(shared_checkpoint: Any) -> None:
    """As in the reference without regard to dots: "ond" is the end of "second"."""
    targets = ["first", "second", "ond"]
    pair = load_both(BASE, shared_checkpoint(BASE, ia3(target_modules=targets, feedforward_modules=["ond"])))
    pair.assert_equal()
    shapes = {path: tuple(layer.ia3_l.shape) for path, layer in pair.ours.base_model.placed["default"].items()}
    assert shapes == {"first": (8, 1), "second": (1, 8)}


def test_a_checkpoint_of_the_other_kind_does_not_fit(checkpoint: Any) -> None:
    """A config that was edited: the vectors would scale the wrong side."""
    folder: Path = checkpoint(BASE, ia3())
    config = folder / "adapter_config.json"
    text = config.read_text()
    assert text.count('"feedforward_modules": [\n    "second"\n  ]') == 1
    config.write_text(text.replace('"feedforward_modules": [\n    "second"\n  ]', '"feedforward_modules": []'))
    with pytest.raises(splice.AdapterMismatchError, match=r"second\.ia3_l.*\(1,8\).*\(4,1\)"):
        splice.PeftModel.from_pretrained(BASE.build(), folder)


def test_only_targets_can_scale_their_input(library: Any) -> None:
    with pytest.raises(ValueError, match="should be a subset of `target_modules`"):
        library.IA3Config(target_modules=["first"], feedforward_modules=["second"])


@pytest.mark.parametrize("base", [bases.LLAMA, bases.T5, bases.GPT2, BASE], ids=str)
def test_all_linear_is_loaded_by_either_library_as_it_was_saved(base: bases.Base, library: Any, tmp_path: Path) -> None:
    """The targets are saved as whole paths, and so are those of them that scale their input."""
    ends = {"linear": ["second"], "gpt2": ["c_fc", "mlp.c_proj"]}.get(base.name, ["down_proj", "wo"])
    config = splice.IA3Config(
        target_modules="all-linear", feedforward_modules=ends, task_type=base.task, init_ia3_weights=False
    )
    model = splice.get_peft_model(base.build(), config).eval()
    scaling = [path for path, layer in model.base_model.placed["default"].items() if layer.is_feedforward]
    assert scaling
    assert all(path.endswith(tuple(ends)) for path in scaling)
    model.save_pretrained(tmp_path)
    again = library.PeftModel.from_pretrained(base.build(), str(tmp_path))
    assert_close(run(again, base.inputs(2)), run(model, base.inputs(2)))


def test_ends_of_targets_may_scale_their_input() -> None:
    """As the reference saves "all-linear", and cannot load it."""
    config = splice.IA3Config(target_modules=["model.first", "model.second"], feedforward_modules=["second"])
    assert config.feedforward_modules == {"second"}


def test_adapters_on_both_sides_of_one_layer(shared_checkpoint: Any) -> None:
    """The reference cannot load the second. Both may be active, and merged; their sum has no meaning."""
    inputs = BASE.inputs(3)
    model = splice.PeftModel.from_pretrained(BASE.build(), shared_checkpoint(BASE, ia3()))
    first = run(model, inputs)
    model.load_adapter(shared_checkpoint(BASE, ia3(feedforward_modules=[]), seed=1), adapter_name="second")
    with pytest.raises(ValueError, match="act on this layer in different ways"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "x")
    assert "x" not in model.peft_config
    model.base_model.set_adapter(["default", "second"])
    both = run(model, inputs)
    assert differ(both, first)
    model.merge_adapter()
    assert_close(run(model, inputs), both)
    model.unmerge_adapter()
    assert torch.equal(run(model, inputs), both)


def test_a_factor_of_zero_is_taken_out_again(shared_checkpoint: Any) -> None:
    """The reference divides by it. Here merging keeps the weight, so unmerging is exact whatever the factors are."""
    model = splice.PeftModel.from_pretrained(BASE.build(), shared_checkpoint(BASE, ia3()))
    with torch.no_grad():
        for layer in model.base_model.placed["default"].values():
            layer.ia3_l.view(-1)[0] = 0
    before = run(model, BASE.inputs(3))
    model.merge_adapter()
    assert not model.get_base_model().first.weight[0].any()
    assert_close(run(model, BASE.inputs(3)), before)
    model.unmerge_adapter()
    assert torch.equal(run(model, BASE.inputs(3)), before)
