"""Every method on quantised bases, beside the same adapter on the dense weights that these stand for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from splice.base.weight_access import dense_weight
from splice.loading import other_base
from tests import bases
from tests.bases import run
from tests.comparing import Snapshot, differ, same_bytes
from tests.quantised import BACKENDS, UNWRITABLE, WAYS, WIDE, Way
from tests.samples import Case, network_cases, option_cases, plain_cases

ways = pytest.mark.parametrize("way", WAYS, ids=str)
backends = pytest.mark.parametrize("way", BACKENDS, ids=str)
cases = pytest.mark.parametrize("case", plain_cases(WIDE), ids=str)
merging = pytest.mark.parametrize("case", [case for case in plain_cases(WIDE) if case.sample.merges], ids=str)
INPUTS = WIDE.inputs(3)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What the libraries say of their own is not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load(way: Way, case: Case, folder: Any, **options: Any) -> tuple[Any, Any]:
    """The adapter on a quantised base, and on the dense one.

    Where it is tied to the very weights that it was trained on, that it is refused is all there is to see.
    """
    if case.sample.refused_on_codes:
        network = way.base()
        before = Snapshot.of(network)
        with pytest.raises((ValueError, RuntimeError), match=case.sample.refused_on_codes):
            splice.PeftModel.from_pretrained(network, folder, **options)
        before.assert_same(network)
        pytest.skip("refused, as it says")
    return tuple(
        splice.PeftModel.from_pretrained(network, folder, **options) for network in (way.base(), way.dense_base())
    )


def _changes_biases_alone(model: Any) -> bool:
    return all(layer.changed_names == ("bias",) for layer in model.base_model.placed["default"].values())


def assert_near(found: torch.Tensor, expected: torch.Tensor, way: Way, factor: float = 1.0) -> None:
    tolerance = factor * way.tolerance
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


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
    ours, dense = load(way, case, shared_checkpoint(WIDE, case.config()))
    assert_near(run(ours, INPUTS), run(dense, INPUTS), way)
    assert differ(run(ours, INPUTS), run(way.base(), INPUTS))


@pytest.mark.parametrize("case", option_cases(WIDE), ids=str)
@backends
def test_so_it_does_with_every_option(way: Way, case: Case, shared_checkpoint: Any) -> None:
    folder = shared_checkpoint(WIDE, case.config())
    if case.trains_biases and "bias" not in dict(way.base().first.named_parameters()):
        with pytest.raises(splice.AdapterMismatchError, match="unexpected.*\n.*first.base_layer.bias"):
            load(way, case, folder)
        return
    ours, dense = load(way, case, folder)
    assert_near(run(ours, INPUTS), run(dense, INPUTS), way)


@backends
@cases
def test_a_new_one_is_loaded_onto_the_same_codes(way: Way, case: Case, tmp_path: Path) -> None:
    """Also where what it is follows from the weight: the codes stand for the same one each time."""
    config = splice.get_peft_config(case.config())
    if not case.sample.made_on_codes:
        with pytest.raises(ValueError, match=case.sample.refused_on_codes):
            splice.get_peft_model(way.base(), config)
        pytest.skip("refused, as it says")
    model = splice.get_peft_model(way.base(), config)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=source), alpha=0.1)
    model.save_pretrained(tmp_path)
    again = splice.PeftModel.from_pretrained(way.base(), tmp_path)
    torch.testing.assert_close(run(again, INPUTS), run(model.eval(), INPUTS))


@backends
@cases
def test_it_is_trained_as_on_the_dense_base(way: Way, case: Case, shared_checkpoint: Any) -> None:
    both = load(way, case, shared_checkpoint(WIDE, case.config()), is_trainable=True)
    for model in both:
        model.train()
        torch.manual_seed(0)  # some draw what they compute in training
        model(**INPUTS).square().sum().backward()
    ours, dense = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in both)
    assert ours and ours.keys() == dense.keys()
    for name, gradient in ours.items():
        scale = dense[name].abs().max() + 1e-6
        torch.testing.assert_close(gradient / scale, dense[name] / scale, rtol=0, atol=max(way.tolerance, 1e-4) * 4)
    assert all(not p.requires_grad for n, p in both[0].named_parameters() if n.endswith(("W_q", "first.weight")))


@backends
@merging
def test_it_is_merged_and_taken_out_again(way: Way, case: Case, shared_checkpoint: Any) -> None:
    """The weights are those of the dense base with the adapter, but for the rounding that the report tells."""
    ours, dense = load(way, case, shared_checkpoint(WIDE, case.config()))
    network, expected = ours.get_base_model(), dense.get_base_model()
    before, plain = Snapshot.of(network), run(ours, INPUTS)
    kept = {name: way.stored(getattr(network, name)) for name in WIDE.targets}
    if _changes_biases_alone(ours):
        with pytest.raises(
            RuntimeError, match="second: adapter 'default' changes the bias, and the base layer has none"
        ):
            ours.merge_adapter()
        before.assert_same(network)
        pytest.skip("refused, as it says")
    ours.merge_adapter()
    dense.merge_adapter()
    losses = {loss.path: loss for loss in ours.base_model.merge_report.losses}
    for name in WIDE.targets if losses else ():
        layer, wanted = getattr(network, name), getattr(expected, name)
        found = dense_weight(layer)
        relative = (found - wanted.weight).norm() / wanted.weight.norm()
        # Not further than the library itself comes with this weight.
        whole = nn.Linear(wanted.in_features, wanted.out_features, bias=False)
        whole.weight.data = wanted.weight.detach().clone()
        least = (way.dense(way.quantised(whole)) - wanted.weight).norm() / wanted.weight.norm()
        assert relative < max(1.01 * least, 1e-6)
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
@merging
def test_it_is_merged_into_a_dense_model(way: Way, case: Case, shared_checkpoint: Any) -> None:
    ours, dense = load(way, case, shared_checkpoint(WIDE, case.config()))
    if _changes_biases_alone(ours):
        with pytest.raises(
            RuntimeError, match="second: adapter 'default' changes the bias, and the base layer has none"
        ):
            ours.merge_and_unload(dequantize=True)
        pytest.skip("refused, as it says")
    network, expected = ours.merge_and_unload(dequantize=True), dense.merge_and_unload()
    assert type(network.first) is nn.Linear
    assert network.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(network, INPUTS), run(expected, INPUTS), rtol=1e-4, atol=1e-5)


@backends
def test_a_merge_says_what_it_has_rounded(way: Way) -> None:
    model = splice.get_peft_model(way.base(), splice.LoraConfig(target_modules=["first"], init_lora_weights=False))
    with pytest.warns(
        splice.PeftWarning, match=rf"default: merged into 1 layer, 1 of them stored as {way.backend}"
    ) as said:
        model.merge_adapter()
    assert "dequantize=True" in str(said[0].message)
    assert "first" in str(model.base_model.merge_report)


@pytest.mark.parametrize("case", network_cases(bases.LLAMA), ids=str)
@backends
def test_methods_on_the_call_of_the_network(way: Way, case: Case, shared_checkpoint: Any) -> None:
    folder, inputs = shared_checkpoint(case.base, case.config()), case.base.inputs(2)
    ours, dense = (
        splice.PeftModel.from_pretrained(network, folder)
        for network in (way.base(case.base), way.dense_base(case.base))
    )
    # Fourteen layers one after the other, some of which round their inputs as well.
    assert_near(run(ours, inputs), run(dense, inputs), way, factor=2)
    assert differ(run(ours, inputs), run(way.base(case.base), inputs))


@ways
def test_the_status_names_the_backend(way: Way) -> None:
    model = splice.get_peft_model(way.base(), splice.LoraConfig(target_modules=["first", "head"]))
    assert [layer.quantization_backend for layer in model.get_layer_status()] == [way.backend, None]
    assert model.get_model_status().quantization_backend == way.backend


@ways
def test_the_values_are_counted_and_not_the_codes(way: Way) -> None:
    config = {"peft_type": "LORA", "target_modules": ["first"]}
    counts = [
        library.get_peft_model(way.base(), library.get_peft_config(config)).get_nb_trainable_parameters()
        for library in (splice, peft)
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@ways
def test_adapters_are_of_the_dtype_that_the_reference_gives_them(way: Way, dtype: torch.dtype, autocast: bool) -> None:
    """In the dtype that the layer computes in, or float32."""
    dtypes = []
    for library in (splice, peft):
        network = way.base(WIDE, dtype=dtype)
        config = library.get_peft_config({"peft_type": "LORA", "target_modules": ["first"]})
        model = library.get_peft_model(network, config, autocast_adapter_dtype=autocast)
        dtypes.append(model.base_model.model.first.lora_A["default"].weight.dtype)
        found = model.base_model.model.first(torch.randn(2, 64, dtype=dtype))
        assert found.dtype is dtype
    assert dtypes[0] is dtypes[1]


@ways
def test_another_form_of_the_base_is_told_once(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it was trained on and which it is given, where all else is the same; `base_gap` tells what comes of it."""
    monkeypatch.setattr(other_base, "_said", set())
    config = splice.LoraConfig(target_modules=["first", "second"], init_lora_weights=False)
    trained = splice.get_peft_model(way.base(), config)
    trained.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", splice.PeftWarning)
        splice.PeftModel.from_pretrained(way.base(), tmp_path)
    with pytest.warns(splice.PeftWarning) as said:
        model = splice.PeftModel.from_pretrained(WIDE.build(), tmp_path)
    (text,) = [str(each.message) for each in said]
    assert f"trained on a base that is stored as {way.backend} (" in text
    assert "and this one is not quantised" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error", splice.PeftWarning)
        splice.PeftModel.from_pretrained(WIDE.build(), tmp_path)
    other = way.base()
    run(other, INPUTS)  # some put their codes in another order at the first call
    before = Snapshot.of(other)
    gap = splice.base_gap(model, INPUTS, other)
    before.assert_same(other)
    expected = run(trained.eval(), INPUTS)
    difference = run(model, INPUTS) - expected
    assert gap.largest == pytest.approx(difference.abs().max().item(), abs=way.tolerance)
    assert gap.relative == pytest.approx((difference.norm() / expected.norm()).item(), abs=way.tolerance)
    assert f"{gap.relative:.1%}" in str(gap)
    assert splice.base_gap(model, INPUTS, WIDE.build()) == (0.0, 0.0, 1.0)


def test_a_gap_is_of_outputs_with_an_adapter() -> None:
    model = splice.get_peft_model(WIDE.build(), splice.LoraConfig(target_modules=["first"]))
    model.base_model.set_adapter([])
    with pytest.raises(ValueError, match="no active adapter"):
        splice.base_gap(model, INPUTS, WIDE.build())


@backends
def test_a_quantised_head_is_trained_as_a_dense_copy(way: Way, shared_checkpoint: Any, tmp_path: Path) -> None:
    """Codes cannot be trained, so the copy of such a module is dense, as it is in the files of others."""
    config = {"peft_type": "LORA", "target_modules": ["first"], "modules_to_save": ["head"]}
    folder = shared_checkpoint(WIDE, config)
    model = splice.PeftModel.from_pretrained(way.base(but=()), folder, is_trainable=True)
    dense = splice.PeftModel.from_pretrained(way.dense_base(but=()), folder)
    assert_near(run(model.eval(), INPUTS), run(dense, INPUTS), way)
    model.train()(**INPUTS).square().sum().backward()
    trained = model.get_base_model().head.modules_to_save["default"]
    assert type(trained) is nn.Linear
    assert trained.weight.grad.any()
    model.save_pretrained(tmp_path)
    again = splice.PeftModel.from_pretrained(WIDE.build(), tmp_path).get_base_model().head
    torch.testing.assert_close(again(torch.ones(1, 64)), trained(torch.ones(1, 64)))
    fresh = splice.get_peft_model(way.base(but=()), splice.get_peft_config(config))
    head = fresh.get_base_model().head
    torch.testing.assert_close(head.modules_to_save["default"].weight.detach(), dense_weight(head))
    merged = model.eval().merge_and_unload()
    assert type(merged.head) is nn.Linear


@ways
def test_the_state_dict_has_the_tensors_of_adapters(way: Way) -> None:
    """Also of layers that write their own in a way of their own."""
    model = splice.get_peft_model(way.base(), splice.LoraConfig(target_modules=["first"], init_lora_weights=False))
    names = [name for name in model.state_dict() if "lora_" in name]
    assert names == [f"base_model.model.first.lora_{x}.default.weight" for x in "AB"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in names}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.zero_()
    found = model.load_state_dict(before, strict=False)
    assert found.unexpected_keys == []
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in names)


@ways
def test_a_base_state_dict_is_that_from_before_a_merge(way: Way) -> None:
    model = splice.get_peft_model(way.base(), splice.LoraConfig(target_modules=["first"], init_lora_weights=False))
    before = {name: copy.deepcopy(tensor) for name, tensor in splice.get_base_model_state_dict(model).items()}
    model.merge_adapter()
    now = splice.get_base_model_state_dict(model)
    assert now.keys() == before.keys() == way.base().state_dict().keys()
    for name, tensor in before.items():
        assert not isinstance(tensor, torch.Tensor) or same_bytes(now[name], tensor), name


@ways
def test_a_copy_and_a_pickle_of_an_adapted_model(way: Way) -> None:
    model = splice.get_peft_model(way.base(), splice.LoraConfig(target_modules=["first"], init_lora_weights=False))
    expected = run(model.eval(), INPUTS)
    torch.testing.assert_close(run(copy.deepcopy(model), INPUTS), expected)
    model.merge_adapter()
    merged = run(model, INPUTS)
    again = copy.deepcopy(model)
    torch.testing.assert_close(run(again, INPUTS), merged)
    again.unmerge_adapter()
    assert_near(run(again, INPUTS), expected, way)
    torch.testing.assert_close(run(model, INPUTS), merged)


@ways
def test_several_adapters_are_merged_one_after_the_other(way: Way) -> None:
    """The second one is added to the weight that the base had, and not to what was left of it when the first was stored."""
    config = splice.LoraConfig(target_modules=["first"], init_lora_weights=False)
    models = [splice.get_peft_model(network, config) for network in (way.base(), way.base())]
    for model in models:
        torch.manual_seed(5)
        model.add_adapter("second", config)
        for seed, parameter in enumerate(p for n, p in model.named_parameters() if "lora_" in n):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
        model.base_model.set_adapter(["default", "second"])
    one, other = models
    one.merge_adapter()
    other.merge_adapter(["default"])
    other.merge_adapter(["second"])
    first, second = (model.get_base_model().first for model in models)
    torch.testing.assert_close(dense_weight(first), dense_weight(second))
    other.unmerge_adapter()
    torch.testing.assert_close(dense_weight(second), dense_weight(way.base().first))


@pytest.mark.parametrize("way", UNWRITABLE, ids=str)
def test_what_cannot_be_written_is_refused_before_anything_changes(way: Way) -> None:
    """The way out is told, and works."""
    network = way.base()
    config = splice.LoraConfig(target_modules=["first", "second"], init_lora_weights=False)
    model = splice.get_peft_model(network, config)
    output = run(model.eval(), INPUTS)
    before = Snapshot.of(network)
    for merge in (model.merge_adapter, model.merge_and_unload, network.second.merge):
        with pytest.raises(splice.UnsupportedFeatureError, match="its weight is a NF4Tensor") as raised:
            merge()
        assert "merge_and_unload(dequantize=True)" in str(raised.value)
        before.assert_same(network)
        assert torch.equal(run(model, INPUTS), output)
    merged = model.merge_and_unload(dequantize=True)
    assert type(merged.second) is nn.Linear
    torch.testing.assert_close(run(merged, INPUTS), output, rtol=1e-4, atol=1e-5)
