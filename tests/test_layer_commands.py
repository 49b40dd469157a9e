"""What libraries do to one adapted layer after the other, in the reference's words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from splice.kinds.slot import Role
from tests import bases
from tests.bases import run
from tests.comparing import Pair, assert_close, load_both, named
from tests.samples import Case, plain_cases

BASE = bases.LINEAR


def both(case: Case, shared_checkpoint: Any) -> Pair:
    folders = [shared_checkpoint(case.base, case.config(), seed=seed) for seed in (0, 1)]
    return load_both(case.base, *folders)


def layers(model: Any) -> list[Any]:
    network = model.base_model.model
    return [network.first, network.second]


@pytest.mark.parametrize("case", plain_cases(BASE), ids=str)
def test_each_layer_told_the_same_is_the_model_told(case: Case, shared_checkpoint: Any) -> None:
    pair = both(case, shared_checkpoint)
    first = pair.assert_equal()
    pair.each(lambda model: [layer.set_adapter("second") for layer in layers(model)])
    second = pair.assert_equal()
    assert [layer.active_adapters for layer in layers(pair.ours)] == [["second"], ["second"]]
    assert not any(layer.disable_adapters for layer in layers(pair.ours))
    pair.each(lambda model: [layer.enable_adapters(enabled=False) for layer in layers(model)])
    assert torch.equal(pair.assert_equal(), run(BASE.build(), BASE.inputs(3)))
    assert layers(pair.ours)[0].disable_adapters
    pair.each(lambda model: [layer.enable_adapters(enabled=True) for layer in layers(model)])
    assert torch.equal(pair.assert_equal(), second)
    pair.each(lambda model: model.set_adapter("default"))
    assert torch.equal(pair.assert_equal(), first)


@pytest.mark.parametrize("case", plain_cases(BASE), ids=str)
def test_one_layer_told_alone(case: Case, shared_checkpoint: Any) -> None:
    """Another adapter on one layer than on the other, until the model is told."""
    pair = both(case, shared_checkpoint)
    first = pair.assert_equal()
    pair.each(lambda model: layers(model)[0].set_adapter("second"))
    assert not torch.equal(pair.assert_equal(), first)
    flags = [{n: p.requires_grad for n, p in named(m)} for m in (pair.ours, pair.reference)]
    assert flags[0] == flags[1]
    pair.each(lambda model: model.set_adapter("default"))
    assert torch.equal(pair.assert_equal(), first)
    trained = [{n for n, p in named(m) if p.requires_grad} for m in (pair.ours, pair.reference)]
    assert trained[0] == trained[1]
    assert not pair.ours.base_model.selection.flags_changed  # the next switch looks at no flags of others
    pair.each(lambda model: layers(model)[0].set_adapter("second"))
    assert not torch.equal(pair.assert_equal(), first)


@pytest.mark.parametrize("case", plain_cases(BASE)[:3], ids=str)
def test_a_layer_told_after_the_model_was_told(case: Case, shared_checkpoint: Any) -> None:
    """What it was told before holds no more, and what it is told then does."""
    pair = both(case, shared_checkpoint)
    first = pair.assert_equal()
    for told in (lambda layer: layer.set_adapter("second"), lambda layer: layer.enable_adapters(False)):
        pair.each(lambda model: layers(model)[0].set_adapter("second"))
        pair.each(lambda model: model.set_adapter("default"))
        pair.each(lambda model, told=told: told(layers(model)[0]))
        assert not torch.equal(pair.assert_equal(), first)


@pytest.mark.parametrize("case", [case for case in plain_cases(BASE) if case.sample.merges], ids=str)
def test_merging_one_layer(case: Case, shared_checkpoint: Any) -> None:
    pair = both(case, shared_checkpoint)
    before = pair.assert_equal()
    weights = [layer.weight for layer in layers(pair.ours)]
    pair.each(lambda model: layers(model)[0].merge(safe_merge=True, adapter_names=["default"]))
    assert_close(pair.assert_equal(), before, factor=10)
    assert layers(pair.ours)[0].merged_adapters == ["default"]
    assert pair.ours.get_model_status().merged_adapters
    with pytest.raises(ValueError, match="unmerge"):
        layers(pair.ours)[0].delete_adapter("default")
    pair.each(lambda model: layers(model)[0].unmerge())
    assert all(now is then for now, then in zip((layer.weight for layer in layers(pair.ours)), weights))
    assert torch.equal(run(pair.ours, BASE.inputs(3)), before)
    assert not pair.ours.base_model.merged
    with pytest.warns(UserWarning, match="Already unmerged"):
        layers(pair.ours)[0].unmerge()


@pytest.mark.parametrize("case", plain_cases(BASE), ids=str)
def test_deleting_from_each_layer(case: Case, shared_checkpoint: Any) -> None:
    """As libraries clean up after a load of theirs that failed; the name is free afterwards."""
    pair = both(case, shared_checkpoint)
    first = pair.assert_equal()
    tuner = pair.ours.base_model
    tuner.set_adapter("second")
    tuner.set_adapter("default")
    for number, layer in enumerate(layers(pair.ours)):
        layer.delete_adapter("second")
        layer.delete_adapter("second")
        if number == 0:  # it is there on the others, and can be switched to as ever
            assert not layer.splice_host.layers.keys() - {"default"} and list(tuner.placed) == ["default", "second"]
            tuner.set_adapter("second")
            tuner.set_adapter("default")
    assert list(tuner.placed) == ["default"]
    pair.ours.peft_config.pop("second")
    assert torch.equal(run(pair.ours, BASE.inputs(3)), first)
    pair.ours.load_adapter(shared_checkpoint(BASE, case.config(), seed=1), "second")
    pair.ours.set_adapter("second")
    pair.reference.set_adapter("second")
    pair.assert_equal()


@pytest.mark.parametrize("case", plain_cases(BASE), ids=str)
def test_flags_of_one_layer(case: Case, shared_checkpoint: Any) -> None:
    pair = both(case, shared_checkpoint)
    pair.each(lambda model: layers(model)[1].set_requires_grad("second"))
    pair.each(lambda model: layers(model)[1].set_requires_grad(["unknown"], False))
    flags = [{n for n, p in named(m) if p.requires_grad} for m in (pair.ours, pair.reference)]
    assert flags[0] == flags[1] != set()
    names = layers(pair.reference)[0].adapter_layer_names
    placed = pair.ours.base_model.placed["default"]["first"]
    fixed = {suffix for suffix, item in placed.registered.items() if item.slot.role is not Role.TRAINED}
    assert set(layers(pair.ours)[0].adapter_layer_names) <= {*names, "trained_bias", *fixed}


@pytest.mark.parametrize("case", plain_cases(BASE)[:1], ids=str)
def test_disabled_for_a_while_where_layers_differ(case: Case, shared_checkpoint: Any) -> None:
    """Afterwards all are enabled, as the reference has it, and it is said so."""
    pair = both(case, shared_checkpoint)
    first = pair.assert_equal()
    pair.each(lambda model: layers(model)[0].enable_adapters(enabled=False))
    assert not torch.equal(pair.assert_equal(), first)
    for model in (pair.ours, pair.reference):
        with pytest.warns(UserWarning, match="some adapter layers that are enabled and others that are disabled"):
            with model.disable_adapter():
                assert torch.equal(run(model, BASE.inputs(3)), run(BASE.build(), BASE.inputs(3)))
    assert torch.equal(pair.assert_equal(), first)
    pair.each(lambda model: layers(model)[0].enable_adapters(enabled=False))
    assert not torch.equal(pair.assert_equal(), first)
