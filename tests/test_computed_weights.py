"""Layers that work their weight out of other parameters at every use: weight normalisation and its like."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from tests import bases
from tests.bases import Base, run
from tests.comparing import Snapshot, assert_close, differ
from tests.samples import Case, plain_cases


class Doubled(nn.Module):
    """A parametrization that no library knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "parametrized": lambda layer: nn.utils.parametrizations.weight_norm(layer, dim=0),
    "hooked": lambda layer: nn.utils.weight_norm(layer, dim=0),
    "of the user": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Doubled()),
}
BASES = (bases.LINEAR, bases.CONV1D, bases.CONV2D, bases.EMBEDDING)
CASES = [
    case
    for case in plain_cases(*BASES)
    if case.sample.merges
    and case.sample.any_base
    and case.sample.reference_on_other_bases
    and not case.method.exclusive
]
DORA = {"peft_type": "LORA", "r": 2, "use_dora": True, "target_modules": ["first", "second"]}


def built(base: Base, way: str) -> Any:
    """The base with both layers changed so; of the older ways torch says that they are old."""
    network = base.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in (network.first, network.second):
            WAYS[way](layer)
            for name, parameter in layer.named_parameters():
                if parameter.dim() > 1:
                    torch.manual_seed(len(name))
                    parameter.data.add_(torch.rand_like(parameter))
    run(network.eval(), base.inputs(3))  # the hooks leave the weight of today
    return network


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_method_is_what_the_reference_has(case: Case, way: str, checkpoint: Any) -> None:
    _compare(case.base, way, case.config(), checkpoint)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", [bases.LINEAR, bases.CONV2D, bases.EMBEDDING], ids=str)
def test_what_computes_with_the_weight_is_what_the_reference_has(base: Base, way: str, checkpoint: Any) -> None:
    _compare(base, way, DORA, checkpoint)


def _compare(base: Base, way: str, config: dict[str, Any], checkpoint: Any) -> None:
    folder = checkpoint(base.build, config)
    inputs, network = base.inputs(3), built(base, way)
    before = Snapshot.of(network)
    model = splice.PeftModel.from_pretrained(network, folder)
    output = run(model, inputs)
    try:
        reference = peft.PeftModel.from_pretrained(built(base, way), str(folder))
        expected = run(reference, inputs)
    except Exception as error:
        pytest.skip(f"the reference cannot: {type(error).__name__}")
    assert_close(output, expected)
    assert differ(output, run(built(base, way), inputs))
    again = Snapshot.of(network)
    changed = {name for layer in model.base_model.placed["default"].values() for name in layer.changed_names}
    if "weight" not in changed:
        model.merge_adapter()  # nothing goes into what is worked out
        assert_close(run(model, inputs), output)
        model.unmerge_adapter()
    for merge in (model.merge_adapter, model.merge_and_unload) if "weight" in changed else ():
        with pytest.raises(NotImplementedError, match="first.*worked out.*remove_parametrizations"):
            merge()
    again.assert_same(network)
    assert torch.equal(run(model, inputs), output)
    model.unload()
    before.assert_same(network)


@pytest.mark.parametrize("way", WAYS)
def test_a_new_adapter_starts_from_the_weight_that_is_used(way: str) -> None:
    """The magnitudes of a new adapter are the norms of that weight, so that nothing changes at first."""
    network, inputs = built(bases.LINEAR, way), bases.LINEAR.inputs(3)
    before = run(network, inputs)
    config = splice.get_peft_config(DORA)
    model = splice.get_peft_model(network, config)
    assert_close(run(model.eval(), inputs), before)


def test_no_weight_is_shown_where_the_layer_would_not_see_it() -> None:
    """A parametrized attribute is found before all others: what an adapter puts there would have no effect."""
    config = splice.get_peft_config(
        {
            "peft_type": "LORA",
            "r": 2,
            "target_modules": ["second"],
            "init_lora_weights": "loftq",
            "loftq_config": {"loftq_bits": 4},
        }
    )
    network = built(bases.LINEAR, "parametrized")
    before = Snapshot.of(network)
    with pytest.raises(splice.UnsupportedFeatureError, match="second.*remove_parametrizations"):
        splice.get_peft_model(network, config)
    before.assert_same(network)
