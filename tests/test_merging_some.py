"""Merging some of several active adapters: the output stays what it was, or the merge is refused in words."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import splice
from splice.checkpoint.types import PeftType
from tests import bases
from tests.bases import run
from tests.comparing import Snapshot, assert_close
from tests.samples import SAMPLES, Case, plain_cases

# Beside a plain one of every method, what else can be said of one on the same layers.
FIELDS: dict[str, dict[str, Any]] = {
    **{case.method.name.value: case.config() for case in plain_cases(bases.LINEAR)},
    "DoRA": {"peft_type": "LORA", "r": 2, "use_dora": True},
    "lora_bias": {"peft_type": "LORA", "r": 2, "lora_bias": True},
    "trained bias": {"peft_type": "LORA", "r": 2, "bias": "lora_only"},
    "outputs": {"peft_type": "IA3", "feedforward_modules": []},
    "pissa": {"peft_type": "LORA", "r": 2, "init_lora_weights": "pissa"},
    "rows": {"peft_type": "LORA", "r": 2, "target_modules": ["first"], "trainable_token_indices": {"second": [1, 3]}},
}
EXCLUSIVE = {PeftType.LN_TUNING.value}
# Nor those that nothing merges.
WITHOUT = {m.value for m, sample in SAMPLES.items() if not sample.merges}
NAMES = [name for name in FIELDS if name not in EXCLUSIVE and name not in WITHOUT]
# Beside all others stand those that do so for their kind; the rest beside the plainest and another of its own.
FEW = {m.value for m, sample in SAMPLES.items() if not sample.on_every_base}
PAIRS = [(a, b) for a, b in itertools.product(NAMES, NAMES) if a == b or not FEW & {a, b} or "LORA" in (a, b)]


def _model(names: tuple[str, str]) -> Any:
    """Both are active, and their values are such that an order that is not theirs shows."""
    model = None
    for place, name in enumerate(names):
        config = splice.get_peft_config({"target_modules": ["first", "second"], **FIELDS[name]})
        if model is None:
            model = splice.get_peft_model(bases.LINEAR.build(), config, "a", mixed=True)
        else:
            model.add_adapter("b", config)
        torch.manual_seed(place)
        with torch.no_grad():
            for layer in model.base_model.placed["ab"[place]].values():
                for _, tensor in layer.named_slots():
                    tensor.add_(0.5 * torch.randn_like(tensor))
    assert model is not None
    model.base_model.set_adapter(["a", "b"])
    return model.eval()


def _pair(names: tuple[str, str]) -> Any:
    try:
        return _model(names)
    except (ValueError, NotImplementedError, TypeError) as error:
        pytest.skip(f"they cannot stand together: {error}")


def _refusal(model: Any, name: str) -> str:
    """What the refusal says; empty if the adapter was merged."""
    try:
        model.base_model.merge_adapter([name])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("one", ["a", "b"])
@pytest.mark.parametrize("names", PAIRS, ids=" and ".join)
def test_one_of_two_merged_changes_no_output(names: tuple[str, str], one: str) -> None:
    model = _pair(names)
    network, inputs = model.base_model.model, bases.LINEAR.inputs(3)
    before, output = Snapshot.of(network), run(model, inputs)
    other = "b" if one == "a" else "a"
    refusal = _refusal(model, one)
    if refusal:
        assert all(repr(name) in refusal for name in ("a", "b"))
        assert "together" in refusal
        before.assert_same(network)
        assert not model.base_model.merged
        assert torch.equal(run(model, inputs), output)
    else:
        assert_close(run(model, inputs), output, factor=10)
        with pytest.warns(UserWarning, match="lready (merged|following adapters were merged)"):
            model.base_model.merge_adapter([other])
        assert_close(run(model, inputs), output, factor=10)
        model.base_model.unmerge_adapter()
        assert torch.equal(run(model, inputs), output)
    model.base_model.merge_adapter(["b", "a"])  # in any order of the names
    assert_close(run(model, inputs), output, factor=10)


def test_which_may_be_merged_alone() -> None:
    """Not everything is refused: what only adds may always be, and what is innermost."""
    linear = {name for name in NAMES if FIELDS[name]["peft_type"] in ("LOHA", "LOKR", "LORA", "VERA", "FOURIERFT")}
    adding = sorted(linear - {"DoRA", "rows", "trained bias", "lora_bias"})
    for names in itertools.product(adding[:4], adding[:4]):
        for one in ("a", "b"):
            _model(names).base_model.merge_adapter([one])
    refused = _model(("OFT", "OFT"))
    refused.base_model.merge_adapter(["b"])
    with pytest.raises(ValueError, match="other order|another order"):
        _model(("OFT", "OFT")).base_model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="another order"):
        _model(("LORA", "DoRA")).base_model.merge_adapter(["b"])


def test_what_stays_hides_only_what_it_shows() -> None:
    """A trained bias hides the base's own: an update of the weight may be merged under it, one of the bias may not."""
    model = _model(("trained bias", "LORA"))
    model.base_model.merge_adapter(["b"])
    assert list(model.base_model.merged) == ["b"]
    with pytest.raises(ValueError, match="together"):
        _model(("trained bias", "lora_bias")).base_model.merge_adapter(["b"])


@pytest.mark.parametrize("case", [c for c in plain_cases(bases.LINEAR) if c.sample.merges], ids=str)
def test_one_of_two_may_be_kept_for_good(case: Case, shared_checkpoint: Any) -> None:
    """The other one goes, so no order is at stake."""
    model = splice.PeftModel.from_pretrained(bases.LINEAR.build(), shared_checkpoint(case.base, case.config()))
    model.load_adapter(shared_checkpoint(case.base, case.other_config(), seed=1), "second")
    outputs = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        outputs[name] = run(model, case.base.inputs(3))
    if not case.method.exclusive:
        model.base_model.set_adapter(["default", "second"])
    network = model.merge_and_unload(adapter_names=["default"])
    assert_close(run(network, case.base.inputs(3)), outputs["default"], factor=3)


def test_the_order_of_one_layer_told_alone() -> None:
    model = _model(("OFT", "OFT"))
    output = run(model, bases.LINEAR.inputs(3))
    layer = model.base_model.model.first
    with pytest.raises(ValueError, match="first: merging 'a' without 'b'"):
        layer.merge(adapter_names=["a"])
    layer.merge(adapter_names=["b"])
    assert_close(run(model, bases.LINEAR.inputs(3)), output, factor=10)
