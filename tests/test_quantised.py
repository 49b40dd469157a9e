"""Every method on quantised bases, beside the same adapter on the dense weights that these stand for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import splice
from splice.base.weight_access import dense_weight
from tests.bases import run
from tests.comparing import Snapshot, differ, same_bytes
from tests.quantised import BACKENDS, WAYS, WIDE, Way
from tests.samples import Case, option_cases, plain_cases

ways = pytest.mark.parametrize("way", WAYS, ids=str)
backends = pytest.mark.parametrize("way", BACKENDS, ids=str)
cases = pytest.mark.parametrize("case", plain_cases(WIDE), ids=str)
INPUTS = WIDE.inputs(3)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What the libraries say of their own is not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load(way: Way, folder: Any, **options: Any) -> tuple[Any, Any]:
    """The adapter on a quantised base, and on the dense one."""
    return tuple(
        splice.PeftModel.from_pretrained(network, folder, **options) for network in (way.base(), way.dense_base())
    )


def assert_near(found: torch.Tensor, expected: torch.Tensor, way: Way) -> None:
    torch.testing.assert_close(found, expected, rtol=way.tolerance, atol=way.tolerance)


@ways
def test_the_dense_weight_is_what_the_layer_computes_with(way: Way) -> None:
    for layer in (way.base().first, way.base().second):
        layer(torch.randn(2, layer.in_features))  # some keep it elsewhere after the first call
        bias = layer.bias if layer.bias is not None else 0
        columns = layer(torch.eye(layer.in_features)) - bias
        assert_near(dense_weight(layer), columns.T, way)


@backends
@cases
def test_it_computes_what_it_does_on_the_dense_base(way: Way, case: Case, shared_checkpoint: Any) -> None:
    ours, dense = load(way, shared_checkpoint(WIDE, case.config()))
    assert_near(run(ours, INPUTS), run(dense, INPUTS), way)
    assert differ(run(ours, INPUTS), run(way.base(), INPUTS))


@pytest.mark.parametrize("case", option_cases(WIDE), ids=str)
@backends
def test_so_it_does_with_every_option(way: Way, case: Case, shared_checkpoint: Any) -> None:
    folder = shared_checkpoint(WIDE, case.config())
    if case.trains_biases and "bias" not in dict(way.base().first.named_parameters()):
        with pytest.raises(splice.AdapterMismatchError, match="unexpected.*\n.*first.base_layer.bias"):
            load(way, folder)
        return
    ours, dense = load(way, folder)
    assert_near(run(ours, INPUTS), run(dense, INPUTS), way)


@backends
@cases
def test_it_is_trained_as_on_the_dense_base(way: Way, case: Case, shared_checkpoint: Any) -> None:
    both = load(way, shared_checkpoint(WIDE, case.config()), is_trainable=True)
    for model in both:
        model.train()
        model(**INPUTS).square().sum().backward()
    ours, dense = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in both)
    assert ours and ours.keys() == dense.keys()
    for name, gradient in ours.items():
        scale = dense[name].abs().max() + 1e-6
        torch.testing.assert_close(gradient / scale, dense[name] / scale, rtol=0, atol=max(way.tolerance, 1e-4) * 4)
    assert all(not p.requires_grad for n, p in both[0].named_parameters() if n.endswith(("W_q", "first.weight")))


@backends
@cases
def test_it_is_merged_and_taken_out_again(way: Way, case: Case, shared_checkpoint: Any) -> None:
    """The weights are those of the dense base with the adapter, but for the rounding that the report tells."""
    ours, dense = load(way, shared_checkpoint(WIDE, case.config()))
    network, expected = ours.get_base_model(), dense.get_base_model()
    before, plain = Snapshot.of(network), run(ours, INPUTS)
    kept = {name: way.stored(getattr(network, name)) for name in WIDE.targets}
    ours.merge_adapter()
    dense.merge_adapter()
    losses = {loss.path: loss for loss in ours.base_model.merge_report.losses}
    for name in WIDE.targets if losses else ():
        layer, wanted = getattr(network, name), getattr(expected, name)
        found = dense_weight(layer)
        relative = (found - wanted.weight).norm() / wanted.weight.norm()
        assert relative < way.step
        assert relative.item() == pytest.approx(losses[name].relative, rel=1e-2, abs=1e-5)
        assert losses[name].backend == way.backend
        if wanted.bias is not None:
            torch.testing.assert_close(layer.bias, wanted.bias)
        wanted.weight.data = found
    assert_near(run(ours, INPUTS), run(dense, INPUTS), way)
    ours.unmerge_adapter()
    before.assert_same(network)
    assert all(same_bytes(a, b) for name in kept for a, b in zip(kept[name], way.stored(getattr(network, name))))
    assert torch.equal(run(ours, INPUTS), plain)


@backends
@cases
def test_it_is_merged_into_a_dense_model(way: Way, case: Case, shared_checkpoint: Any) -> None:
    ours, dense = load(way, shared_checkpoint(WIDE, case.config()))
    network, expected = ours.merge_and_unload(dequantize=True), dense.merge_and_unload()
    assert type(network.first) is nn.Linear
    assert network.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(network, INPUTS), run(expected, INPUTS), rtol=1e-4, atol=1e-5)


def test_a_merge_says_what_it_has_rounded() -> None:
    way = BACKENDS[0]
    model = splice.get_peft_model(way.base(), splice.LoraConfig(target_modules=["first"], init_lora_weights=False))
    with pytest.warns(
        splice.PeftWarning, match=rf"default: merged into 1 layer, 1 of them stored as {way.backend}"
    ) as said:
        model.merge_adapter()
    assert "dequantize=True" in str(said[0].message)
    assert "first" in str(model.base_model.merge_report)
