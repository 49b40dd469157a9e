"""What scripts and other libraries read and set on an adapted layer, in the reference's words."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from splice.kinds.effect import Action
from splice.kinds.host import in_order
from splice.kinds.registry import all_methods
from tests import bases
from tests.bases import run
from tests.comparing import Pair, assert_close, assert_same_tensors, differ, load_both, named
from tests.samples import SAMPLES, Case, kind_cases, plain_cases

every = pytest.mark.parametrize("case", [*kind_cases(), *plain_cases(bases.MIXED, *bases.TRANSFORMERS)], ids=str)
kinds = pytest.mark.parametrize("case", kind_cases(), ids=str)


def two_of_each(case: Case, shared_checkpoint: Any, **options: Any) -> Pair:
    first = shared_checkpoint(case.base, case.config(modules_to_save=[case.base.head]))
    return load_both(case.base, first, shared_checkpoint(case.base, case.other_config(), seed=1), **options)


def layers(pair: Pair) -> list[tuple[str, Any, Any]]:
    """(path, the reference's layer, ours) for every target."""
    return [
        (path, *(model.get_base_model().get_submodule(path) for model in (pair.reference, pair.ours)))
        for path in pair.ours.targeted_module_names
    ]


# -- tensors


@every
def test_every_name_of_the_reference_leads_to_the_live_tensor(case: Case, shared_checkpoint: Any) -> None:
    """`model.get_parameter("...lora_A.default.weight")` and its like, for every parameter that the reference has."""
    pair = two_of_each(case, shared_checkpoint)
    # Where layers share tensors, some of them under several names.
    ours = {**dict(pair.ours.named_parameters(remove_duplicate=False)), **dict(named(pair.ours))}
    for name, tensor in pair.reference.named_parameters():
        found = pair.ours
        for part in name.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        assert found is ours[name], name
        assert torch.equal(found, tensor), name


@kinds
def test_tensors_by_attribute_and_adapter_name(case: Case, shared_checkpoint: Any) -> None:
    """`layer.lora_A["default"]` and its like: live, and with the dict methods that scripts use."""
    pair = two_of_each(case, shared_checkpoint)
    for path, theirs, ours in layers(pair):
        adapter = pair.ours.base_model.placed["default"][path]
        for attribute in {suffix.partition(".")[0] for suffix, _ in adapter.named_slots()}:
            view, reference = getattr(ours, attribute), getattr(theirs, attribute)
            assert "default" in view
            assert "nobody" not in view
            assert set(view.keys()) == set(reference.keys()) == set(view)
            assert len(view) == len(reference) == len(view.values()) == len(view.items())
            with pytest.raises(KeyError):
                view["nobody"]
            value = view["default"]
            assert any(first_tensor(value) is own for _, own in adapter.named_slots())


def first_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else next(value.parameters())


@kinds
def test_what_is_written_through_a_view_takes_effect(case: Case, shared_checkpoint: Any) -> None:
    pair = two_of_each(case, shared_checkpoint)
    before = pair.assert_equal()
    suffix = next(iter(pair.ours.base_model.placed["default"]["first"].registered))
    for model in (pair.reference, pair.ours):
        value = getattr(model.get_base_model().first, suffix.partition(".")[0])["default"]
        with torch.no_grad():
            first_tensor(value).mul_(2).add_(0.3)  # neither alone changes each method: a direction, a skew part
    assert differ(pair.assert_equal(), before)


@kinds
def test_attributes_that_only_other_methods_have(case: Case, shared_checkpoint: Any) -> None:
    """An AttributeError, as on any module, so that `hasattr` tells the truth; also on a layer without that tensor."""
    pair = two_of_each(case, shared_checkpoint)
    foreign = {name for method in all_methods().values() for name in method.tensor_names} - case.method.tensor_names
    for name in (min(foreign), "no_such_thing"):
        assert not hasattr(pair.ours.get_base_model().first, name)
        with pytest.raises(AttributeError, match=name):
            getattr(pair.ours.get_base_model().first, name)


# -- numbers and state


@kinds
def test_numbers(case: Case, shared_checkpoint: Any) -> None:
    pair = two_of_each(case, shared_checkpoint)
    for path, theirs, ours in layers(pair):
        for name in ("scaling", "r", "lora_alpha"):
            if hasattr(theirs, name):
                assert dict(getattr(ours, name)) == dict(getattr(theirs, name)), (path, name)


@kinds
def test_state(case: Case, shared_checkpoint: Any) -> None:
    """Which adapters are active, merged, disabled: after every change the same as in the reference."""
    if not (case.sample.reference_unmerges and case.sample.merges):
        pytest.skip("the reference cannot unmerge")
    pair = two_of_each(case, shared_checkpoint)
    # The one that may be merged alone, also of methods whose order matters.
    innermost = in_order(pair.ours.get_base_model().first.splice_host.layers, ["second", "default"])[0]
    for change in (
        lambda model: None,
        lambda model: model.set_adapter("second"),
        lambda model: model.base_model.set_adapter("default" if case.method.exclusive else ["second", "default"]),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.base_model.enable_adapter_layers(),
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
        lambda model: model.merge_adapter([innermost]),
        lambda model: model.unmerge_adapter(),
        lambda model: model.delete_adapter("default"),
    ):
        pair.each(change)
        for path, theirs, ours in layers(pair):
            for name in ("active_adapters", "merged", "merged_adapters", "disable_adapters"):
                assert getattr(ours, name) == getattr(theirs, name), (path, name)
            # A name or a list of them: the reference keeps it as it was last set.
            assert _listed(ours.active_adapter) == _listed(theirs.active_adapter), path


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


@kinds
def test_views_hold_nothing(case: Case, shared_checkpoint: Any) -> None:
    """They are not part of the module: no name in `state_dict`, no child, nothing in the instance."""
    pair = two_of_each(case, shared_checkpoint)
    layer = pair.ours.get_base_model().first
    before = list(layer.state_dict()), [name for name, _ in layer.named_modules()], set(vars(layer))
    for name in ("scaling", "r", "base_layer", "merged", "active_adapters", "original_module"):
        getattr(layer, name, None)
    assert (list(layer.state_dict()), [name for name, _ in layer.named_modules()], set(vars(layer))) == before


# Attributes of the reference's layers that nobody reads: options of the run, state of its wrappers, copies of the base's.
NOT_SHOWN = {
    *("kwargs", "lora_variants", "frozen_peft_weight_names", "is_target_conv_1d_layer", "ephemeral_gpu_offload"),
    *("pvera_generator", "num_bases"),
    *("input_fns", "output_fns", "device_mesh", "tp_layer", "conv_fn", "quantization_backend", "is_feedforward"),
    *(
        "bias",
        "trainable_tokens_original",
        "tied_adapter",
        "cast_input_dtype_enabled",
        "other_param_names",
        "lora_variant",
    ),
}

# OFT on embeddings tells the size of the vectors as `in_features`; others, and we, the vocabulary.
# Its BOFT has whether its kernel could be compiled, and permutations as dense matrices; its MiSS the variant of the layer's
# first adapter, and the new weight in the place of the difference; its GraLoRA an Identity where an adapter has no factors.
OTHERWISE = {
    (splice.PeftType.OFT, "in_features"),
    (splice.PeftType.OFT, "out_features"),
    (splice.PeftType.ADAMSS, "dtype"),  # one for all adapters of the layer, the base's
    (splice.PeftType.OSF, "hook_handles"),  # of hooks, where gradients are projected in the graph here
    (splice.PeftType.BOFT, "fbd_cuda_available"),
    (splice.PeftType.BOFT, "boft_P"),
    (splice.PeftType.MISS, "miss_fn"),
    (splice.PeftType.MISS, "get_delta_weight"),
    (splice.PeftType.SHIRA, "shira_indices"),  # a container like all others, there a dict
    (splice.PeftType.GRALORA, "module_name"),
    (splice.PeftType.GRALORA, "gralora_A_general"),
    (splice.PeftType.GRALORA, "gralora_B_general"),
}


def readable(layer: Any) -> dict[str, Any]:
    """What can be read on a layer of the reference that is no method, by name."""
    plain = set(dir(nn.Module()))
    names = {name for name in dir(layer) if not name.startswith("_") and name not in plain | NOT_SHOWN}
    values = {name: getattr(layer, name, None) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, nn.Module) or not callable(value)}


@kinds
def test_everything_that_is_read_on_a_layer(case: Case, shared_checkpoint: Any) -> None:
    """What the reference's layers have can be read here, with the same adapters and values: also what is empty."""
    pair = two_of_each(case, shared_checkpoint)
    for change in (lambda model: None, lambda model: model.delete_adapter("default")):
        pair.each(change)
        for path, theirs, ours in layers(pair):
            for name, value in readable(theirs).items():
                if (case.method.name, name) in OTHERWISE:
                    continue
                assert hasattr(ours, name), (path, name)
                assert same_view(getattr(ours, name), value), (path, name, getattr(ours, name), value)
            assert set(theirs.adapter_layer_names) >= set(ours.adapter_layer_names) - {"trained_bias"}


def same_view(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, (dict, nn.ModuleDict, nn.ParameterDict)) or hasattr(wanted, "keys"):
        kind = not isinstance(wanted, dict) or isinstance(found, dict)
        return kind and set(found.keys()) == set(wanted.keys()) and all(same_view(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, torch.Tensor):
        values = wanted.is_floating_point() or torch.equal(found, wanted)
        return isinstance(found, torch.Tensor) and found.shape == wanted.shape and values
    if isinstance(wanted, (nn.Identity, nn.Dropout)):
        return isinstance(found, type(wanted)) and getattr(found, "p", 0) == getattr(wanted, "p", 0)
    if isinstance(wanted, nn.Module):
        return isinstance(found, nn.Module)
    return bool(found == wanted) or name_of_tensors(wanted)


def name_of_tensors(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


@kinds
def test_the_change_of_the_weight(case: Case, shared_checkpoint: Any) -> None:
    """`get_delta_weight`: the reference's, or refused where it is not all that the adapter does."""
    pair = two_of_each(case, shared_checkpoint)
    for path, theirs, ours in layers(pair):
        weight = ours.get_base_weight()
        assert weight is ours._parameters["weight"]
        adapter = pair.ours.base_model.placed["default"][path]
        refused = ""
        try:
            delta = ours.get_delta_weight("default")
        except NotImplementedError as error:
            refused = str(error)
        if refused:
            assert re.match(f"{path}.*merge_adapter", refused)
            # There it is the rotation, or there is none.
            others = adapter.action is Action.OTHER or not case.sample.merges
            assert others or not hasattr(theirs, "get_delta_weight")
            continue
        if not hasattr(theirs, "get_delta_weight") or (case.method.name, "get_delta_weight") in OTHERWISE:
            own = {name: tensor for name, tensor in ours._parameters.items() if tensor is not None}
            assert_close(delta, adapter.deltas(own)["weight"])
            continue
        expected = theirs.get_delta_weight("default").detach().to_dense()
        if case.method.name == splice.PeftType.HIRA:  # there it is what the weight is multiplied with
            expected = expected.reshape(weight.shape) * weight.detach()
        # The reference's FourierFT has it as (out, in) for every layer.
        as_stored = expected if expected.shape == weight.shape else expected.T
        assert_close(delta.detach(), as_stored.reshape(weight.shape))
        with pytest.raises(KeyError):
            ours.get_delta_weight("nobody")


def test_views_are_what_programs_take_them_for() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model = splice.get_peft_model(network, splice.LoraConfig(target_modules=["0"], r=2, lora_alpha=4, lora_dropout=0.5))
    layer: Any = network[0]
    assert isinstance(layer.scaling, dict)
    assert json.loads(json.dumps({"s": layer.scaling, "r": layer.r})) == {"s": {"default": 2.0}, "r": {"default": 2}}
    held = layer.scaling
    layer.scale_layer(3)
    assert held == {"default": 6.0} == held.copy() == dict(held)
    held["default"] = 1.0
    assert layer.scaling["default"] == 1.0
    layer.scaling = {"default": 5.0}
    assert layer.splice_host.layers["default"].scale == 5.0
    layer.lora_dropout["default"].p = 0.0
    assert isinstance(layer.lora_dropout["default"], nn.Identity)
    for name, value in (("merged", True), ("active_adapter", "other"), ("r", 3)):
        with pytest.raises(AttributeError, match=f"0: '{name}' tells what the adapters"):
            setattr(layer, name, value)
    with pytest.raises(TypeError, match="follows from its config"):
        layer.use_rslora["default"] = True
    with pytest.raises(NotImplementedError, match="add_adapter"):
        layer.update_layer("other", 4, 8, None)
    assert layer._all_available_adapter_names() == ["default"]
    assert copy.deepcopy(held) == {"default": 5.0}
    assert model.base_model._check_target_module_exists(model.peft_config["default"], "0")


def test_views_give_way_to_attributes_of_the_base() -> None:
    class Own(nn.Linear):
        fan_in_fan_out = "own"

        def __init__(self) -> None:
            super().__init__(4, 4)
            self.scaling, self.r = "mine", 7

    network = nn.Sequential(Own())
    splice.get_peft_model(network, splice.LoraConfig(target_modules=["0"]))
    layer: Any = network[0]
    assert (layer.scaling, layer.r, layer.fan_in_fan_out) == ("mine", 7, "own")
    layer.r = 8
    assert layer.r == 8
    del layer.scaling
    assert layer.scaling == {"default": 1.0}


def test_starting_anew() -> None:
    """`reset_lora_parameters`: new values for A and B, in place; refused where that is not all there is to it."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    config = splice.LoraConfig(target_modules=["0"], init_lora_weights=False)
    splice.get_peft_model(network, config)
    layer: Any = network[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    before = a.detach().clone()
    layer.reset_lora_parameters("nobody", True)
    layer.reset_lora_parameters("default", False)
    assert torch.equal(a, before)
    layer.reset_lora_parameters("default", True)
    assert layer.lora_A["default"].weight is a
    assert not torch.equal(a, before)
    assert not b.any()
    with pytest.raises(splice.UnsupportedFeatureError, match="more than new values"):
        layer.reset_lora_parameters("default", "pissa")
    with pytest.raises(ValueError, match="nonsense"):
        layer.reset_lora_parameters("default", "nonsense")


# -- the base layer


@kinds
def test_the_base_layer(case: Case, shared_checkpoint: Any) -> None:
    """Of the class it had; calling it gives what the base gives; its tensors are the adapted layer's own."""
    fresh = case.base.build()
    pair = two_of_each(case, shared_checkpoint)
    inputs: dict[str, torch.Tensor] = {}
    fresh.first.register_forward_hook(lambda m, args, y: inputs.update(x=args[0], y=y))
    run(fresh, case.base.inputs(3))
    layer = pair.ours.get_base_model().first
    for base in (layer.base_layer, layer.get_base_layer()):
        assert type(base) is type(fresh.first)
        assert torch.equal(base(inputs["x"]), inputs["y"])
        assert differ(layer(inputs["x"]), inputs["y"])
        assert base.weight is layer._parameters["weight"]
        assert list(base.state_dict()) == list(fresh.first.state_dict())
        assert len(list(base.parameters())) == len(list(fresh.first.parameters()))
        with torch.no_grad():
            base.weight.add_(1)
            assert torch.equal(layer._parameters["weight"], fresh.first.weight + 1)
            base.weight.copy_(fresh.first.weight)
        assert repr(base).startswith(type(fresh.first).__name__)


@kinds
def test_an_attribute_set_on_the_base_layer_is_set_on_the_layer(case: Case, shared_checkpoint: Any) -> None:
    """They are one object: a new weight goes into the model, as through the reference's `base_layer`."""
    if case.method.exclusive:
        pytest.skip("a copy stands in for the layer")
    pair = two_of_each(case, shared_checkpoint)
    before = pair.assert_equal()
    for model in (pair.reference, pair.ours):
        layer = model.get_base_model().first
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight * 5)
    assert differ(pair.assert_equal(), before) is not case.sample.has_own_weight


@kinds
def test_the_base_layer_of_a_merged_layer_has_the_merged_weight(case: Case, shared_checkpoint: Any) -> None:
    if not case.sample.merges:
        pytest.skip("there is nothing to merge")
    pair = two_of_each(case, shared_checkpoint)
    pair.each(lambda model: model.merge_adapter())
    for _, theirs, ours in layers(pair):
        assert_close(ours.base_layer.weight.detach(), theirs.base_layer.weight.detach())
        assert_close(ours.weight.detach(), theirs.weight.detach())


@every
def test_the_layer_is_still_one_of_its_kind(case: Case, shared_checkpoint: Any) -> None:
    fresh = case.base.build()
    pair = two_of_each(case, shared_checkpoint)
    for path, _, ours in layers(pair):
        original = fresh.get_submodule(path)
        assert isinstance(ours, type(original))
        assert type(original).__name__ in type(ours).__name__
        if type(original).__repr__ is nn.Module.__repr__:
            assert "default" in repr(ours)
        for name in ("in_features", "out_features", "num_embeddings", "embedding_dim", "kernel_size", "groups", "nf"):
            if hasattr(original, name):
                assert getattr(ours, name) == getattr(original, name)
        assert torch.equal(ours.base_layer.weight, original.weight)
        if not any(adapter.stands_in for adapter in ours.splice_host.layers.values()):
            assert torch.equal(ours.weight, original.weight)


# -- a module saved whole


@every
def test_a_copy_and_its_original(case: Case, shared_checkpoint: Any) -> None:
    if not case.saves_modules:
        pytest.skip("has no modules_to_save")
    pair = two_of_each(case, shared_checkpoint)
    theirs, ours = (model.get_base_model().get_submodule(case.base.head) for model in (pair.reference, pair.ours))
    original = case.base.build().get_submodule(case.base.head)
    assert type(ours.original_module) is type(original)
    assert type(ours.modules_to_save["default"]) is type(original)
    assert_same_tensors(ours.original_module.state_dict(), original.state_dict())
    assert_same_tensors(ours.modules_to_save["default"].state_dict(), theirs.modules_to_save["default"].state_dict())
    x = torch.randn(2, original.weight.shape[-1])
    assert torch.equal(ours.original_module(x), original(x))
    assert_close(ours(x).detach(), theirs(x).detach())
    assert differ(ours(x), original(x))
    assert ("second" in ours.modules_to_save) == ("second" in theirs.modules_to_save)


# -- scales


SCALED = [case for case in kind_cases() if SAMPLES[case.method.name].reference_scales]
# The reference's `scale_layer` leaves embeddings out.
COMPARED = [case for case in SCALED if case.base is not bases.EMBEDDING]


@pytest.mark.parametrize("case", SCALED, ids=str)
def test_scale_layer_multiplies_the_scale_of_the_active_adapters(case: Case, shared_checkpoint: Any) -> None:
    pair = two_of_each(case, shared_checkpoint)
    layer = pair.ours.get_base_model().first
    before = dict(layer.scaling)
    layer.scale_layer(3.0)
    assert layer.scaling == {**before, "default": before["default"] * 3}
    layer.unscale_layer(1.5)
    assert layer.scaling == {**before, "default": before["default"] * 2}
    layer.unscale_layer()
    assert layer.scaling == before


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_scales(case: Case, shared_checkpoint: Any) -> None:
    """`set_scale`, `scale_layer` and `unscale_layer` change the output as in the reference."""
    pair = two_of_each(case, shared_checkpoint)
    pair.each(lambda model: model.base_model.set_adapter(["default", "second"]))
    before = pair.assert_equal()

    def on_each_layer(change: Any) -> torch.Tensor:
        for _, theirs, ours in layers(pair):
            change(theirs)
            change(ours)
            assert dict(ours.scaling) == pytest.approx(dict(theirs.scaling))
        return pair.assert_equal()

    assert differ(on_each_layer(lambda layer: layer.set_scale("default", 2.5)), before)
    on_each_layer(lambda layer: layer.set_scale("nobody", 7.0))
    on_each_layer(lambda layer: layer.scale_layer(0.5))
    on_each_layer(lambda layer: layer.scale_layer(3.0))
    on_each_layer(lambda layer: layer.scale_layer(1))
    on_each_layer(lambda layer: layer.unscale_layer(3.0))
    on_each_layer(lambda layer: layer.unscale_layer())
    on_each_layer(lambda layer: layer.set_scale("second", 0))
    pair.each(lambda model: model.set_adapter("second"))
    assert torch.equal(run(pair.ours, case.base.inputs(3)), run(case.base.build(), case.base.inputs(3))) == (
        not differ(run(pair.reference, case.base.inputs(3)), run(case.base.build(), case.base.inputs(3)))
    )


@pytest.mark.parametrize("case", SCALED, ids=str)
def test_a_scale_belongs_to_one_adapter_on_one_layer(case: Case, shared_checkpoint: Any) -> None:
    pair = two_of_each(case, shared_checkpoint)
    first, second = (pair.ours.get_base_model().get_submodule(path) for path in ("first", "second"))
    before = dict(first.scaling), dict(second.scaling)
    first.set_scale("default", 5.0)
    assert dict(second.scaling) == before[1]
    assert first.scaling["second"] == before[0]["second"]
    assert first.scaling["default"] == before[0]["default"] * 5


@pytest.mark.parametrize("case", SCALED[:1], ids=str)
def test_a_scale_set_through_the_dict(case: Case, shared_checkpoint: Any) -> None:
    """Scripts write `layer.scaling["default"] = x`: it takes effect."""
    pair = two_of_each(case, shared_checkpoint)
    before = pair.assert_equal()
    for _, theirs, ours in layers(pair):
        theirs.scaling["default"] = 0.25
        ours.scaling["default"] = 0.25
        assert ours.scaling["default"] == 0.25
    assert differ(pair.assert_equal(), before)


# -- finding adapted layers


def test_layers_are_found_by_what_they_have(library: Any, shared_checkpoint: Any) -> None:
    """The usual loop of scripts over a model's modules."""
    case = plain_cases(bases.LLAMA)[0]
    model = library.PeftModel.from_pretrained(case.base.build(), str(shared_checkpoint(case.base, case.config())))
    found = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    assert sorted(name.removeprefix("base_model.model.") for name in found) == sorted(model.targeted_module_names)


def test_the_network_knows_its_adapters(shared_checkpoint: Any) -> None:
    case = plain_cases(bases.LLAMA)[0]
    for library in (peft, splice):
        network = case.base.build()
        model = library.PeftModel.from_pretrained(network, str(shared_checkpoint(case.base, case.config())))
        assert network.peft_config is model.peft_config
        assert model.get_base_model() is network
        assert model.base_model.model is network
