"""Updates of a weight that are applied to few rows without being made: they give what the whole update gives."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import splice
from splice.base.layers import LayerKind
from splice.kinds.weight_delta import WeightDelta
from tests.bases import Base, Net, conv1d_of_transformers
from tests.comparing import assert_close
from tests.samples import Case, plain_cases


def _base(name: str, make: Any, kind: LayerKind) -> Base:
    # Large enough that few rows are few, whatever the ranks of the samples.
    network = lambda: Net(make(48, 64), make(64, 40), 40)  # noqa: E731
    return Base(name, network, lambda rows: {"x": torch.randn(rows, 5, 48)}, frozenset({kind}))


BASES = (
    _base("wider", nn.Linear, LayerKind.LINEAR),
    _base("wider_transposed", conv1d_of_transformers, LayerKind.TRANSPOSED_LINEAR),
)


def has_direct_way(case: Case) -> bool:
    (kind,) = case.base.kinds
    layer = case.method.layers[kind]
    return issubclass(layer, WeightDelta) and layer.applied is not WeightDelta.applied


CASES = [
    Case(case.method, case.base, option)
    for case in plain_cases(*BASES)
    if has_direct_way(case)
    for option in ("", *case.sample.options)
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_shape = pytest.mark.parametrize("shape", [(), (1,), (2, 1), (0,)], ids=str)


def layers_of(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
    """The adapter layers of a new adapter whose tensors are all random, on a base of this dtype; nothing is trained."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = splice.get_peft_config(case.config())
        model: Any = splice.get_peft_model(case.base.build(dtype), config, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.requires_grad_(False)
    layers = list(model.base_model.placed["default"].values())
    assert len(layers) == 2
    return layers


def whole(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What the update as a whole gives for `x`."""
    update = layer.update()
    return F.linear(x.to(update.dtype), update)


def test_there_are_methods_with_a_direct_way() -> None:
    assert len({case.method.name for case in CASES}) >= 7


@each_case
@each_shape
def test_it_gives_what_the_whole_update_gives(case: Case, shape: tuple[int, ...]) -> None:
    for layer in layers_of(case):
        x = torch.randn(*shape, layer.shape[1])
        found, expected = layer.directly(x), whole(layer, x)
        if not expected.numel():
            found = layer.delta(x)
        assert found is not None
        assert found.dtype == expected.dtype
        assert_close(found, expected, factor=5)


@each_case
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_in_half_precision_it_is_no_further_off(case: Case, autocast_adapter_dtype: bool) -> None:
    for layer in layers_of(case, torch.bfloat16, autocast_adapter_dtype=autocast_adapter_dtype):
        x = torch.randn(2, layer.shape[1], dtype=torch.bfloat16)
        found, rounded = layer.directly(x), whole(layer, x)
        assert found.dtype == rounded.dtype
        exact = whole(widened(layer), x.float())
        largest = exact.abs().max() + 1e-6
        off, expected = ((y - exact).abs().max() / largest for y in (found, rounded))
        assert off <= 2 * expected + 0.01, (off, expected)


def widened(layer: Any) -> Any:
    """A copy of the adapter layer, and of what it is on, with the same numbers in float32."""
    base = copy.deepcopy(layer.base).float()
    return base.splice_host.layers["default"]


@each_case
def test_a_row_more_than_few_goes_through_the_whole_update(case: Case) -> None:
    """Wherever the border is, it is none that can be seen."""
    for layer in layers_of(case):
        for count in (3, 40, 400):
            x = torch.randn(count, layer.shape[1])
            assert_close(WeightDelta.delta(layer, x), whole(layer, x), factor=5)


@each_case
def test_it_is_not_used_for_gradients_of_what_is_trained(case: Case) -> None:
    """But it gives those of the input."""
    for layer in layers_of(case):
        x = torch.randn(1, layer.shape[1], requires_grad=True)
        direct, expected = layer.directly(x), whole(layer, x)
        weights = torch.randn_like(expected)
        if expected.requires_grad and expected.any():
            gradients = [torch.autograd.grad(y, x, weights)[0] for y in (direct, expected)]
            assert_close(*gradients, factor=5)
        trained = [item for item in layer.registered.values() if isinstance(item.registry[item.name], nn.Parameter)]
        for registry, name, _ in trained:
            registry[name].requires_grad_(True)
            assert layer.directly(x) is None, name
            with torch.no_grad():
                assert layer.directly(x) is not None
            registry[name].requires_grad_(False)


@each_case
def test_it_can_be_compiled_and_mapped(case: Case) -> None:
    """Over parameters too, which `torch.func.functional_call` puts in the place of those that are there."""
    torch.compiler.reset()
    for layer in layers_of(case):
        x = torch.randn(1, layer.shape[1])
        expected = layer.directly(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler looks through caches, and says so
            assert_close(torch.compile(layer.directly, backend="aot_eager", fullgraph=True)(x), expected)
        own = {name: item for name, item in layer.base.named_parameters() if "default" in name}

        def mapped(tensors: dict[str, torch.Tensor], layer: Any = layer, x: torch.Tensor = x) -> torch.Tensor:
            with torch.nn.utils.stateless._reparametrize_module(layer.base, tensors):
                found: torch.Tensor = layer.directly(x)
            return found

        if own:
            several = torch.func.vmap(mapped)({name: torch.stack([2 * t, t]) for name, t in own.items()})
            assert_close(several[1], expected, factor=5)


@pytest.mark.parametrize("sizes", [(12, 20), (20, 12), (14, 14)], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2), (5,)], ids=str)
def test_randlora_does_without_its_factors(sizes: tuple[int, int], shape: tuple[int, ...]) -> None:
    """Of both orientations, also beside a larger layer, of whose tensors it takes a part."""
    torch.manual_seed(0)
    config = splice.RandLoraConfig(r=4, init_weights=False, target_modules=["0", "1"])
    network = nn.Sequential(nn.Linear(*sizes), nn.Linear(sizes[1], 30))
    model: Any = splice.get_peft_model(network, config)
    layer = model.base_model.placed["default"]["0"]
    x = torch.randn(*shape, sizes[0])
    first, second = layer.update()
    expected = F.linear(F.linear(x, first), second)
    assert torch.equal(layer.delta(x), expected)  # as long as it is trained
    with torch.no_grad():
        assert_close(layer.delta(x), expected, factor=5)
