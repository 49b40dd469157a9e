"""Adapters in the base weights, and the base weights given back."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from tests import bases
from tests.bases import run
from tests.comparing import Snapshot, assert_close, base_parameters, differ, layer_parameters, load_both
from tests.samples import Case, kind_cases, option_cases, plain_cases

MERGING_BASES = (*bases.BY_KIND.values(), bases.NO_BIAS, bases.PADDED, bases.MIXED, bases.LLAMA, bases.GPT2, bases.TIED)


def is_mergeable(model: Any) -> bool:
    adapters = [adapter for layers in model.base_model.placed.values() for adapter in layers.values()]
    return all(adapter.mergeable and adapter.merges_exactly for adapter in adapters)


def mergeable_model(case: Case, shared_checkpoint: Any, network: nn.Module | None = None, **changes: Any) -> Any:
    """A model with "default", and "second" on fewer layers; the test is skipped where the method cannot merge."""
    folder = shared_checkpoint(case.base, case.config(**changes))
    model = splice.PeftModel.from_pretrained(network or case.base.build(), folder)
    if not is_mergeable(model):
        pytest.skip("cannot be merged")
    model.load_adapter(shared_checkpoint(case.base, case.other_config(), seed=1), "second")
    return model


def merging_cases() -> list[Case]:
    return [case for case in plain_cases(*MERGING_BASES) if case.sample.merges]


every = pytest.mark.parametrize("case", merging_cases(), ids=str)
together = pytest.mark.parametrize("case", [c for c in merging_cases() if not c.method.exclusive], ids=str)
linear = pytest.mark.parametrize("case", [c for c in plain_cases(bases.LINEAR) if c.sample.merges], ids=str)


def snapshot_of_parameters(network: nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    return {name: (id(p), p.detach().clone()) for name, p in base_parameters(network).items()}


# -- there and back


@every
def test_merging_changes_no_output(case: Case, shared_checkpoint: Any) -> None:
    model = mergeable_model(case, shared_checkpoint)
    inputs = case.base.inputs(3)
    before = run(model, inputs)
    model.merge_adapter()
    assert_close(run(model, inputs), before, factor=3)
    layers = [model.get_base_model().get_submodule(path) for path in model.targeted_module_names]
    assert all(layer.merged and layer.merged_adapters == ["default"] for layer in layers)


@pytest.mark.parametrize("safe_merge", [False, True])
@every
def test_unmerging_gives_back_the_very_parameters(case: Case, safe_merge: bool, shared_checkpoint: Any) -> None:
    """The same objects all the while, with the same bytes in the end, however often."""
    network = case.base.build()
    before = snapshot_of_parameters(network)
    model = mergeable_model(case, shared_checkpoint, network)
    output = run(model, case.base.inputs(3))
    for _ in range(3):
        model.merge_adapter(safe_merge=safe_merge)
        merged = snapshot_of_parameters(network)
        assert case.base.tied or all(merged[name][0] == identity for name, (identity, _) in before.items())
        assert any(not torch.equal(merged[name][1], value) for name, (_, value) in before.items() if name in merged)
        model.unmerge_adapter()
        now = snapshot_of_parameters(network)
        assert {name: identity for name, (identity, _) in now.items()} == {n: i for n, (i, _) in before.items()}
        assert all(torch.equal(value, before[name][1]) for name, (_, value) in now.items())
        assert torch.equal(run(model, case.base.inputs(3)), output)


@together
def test_two_merged_equal_two_active(case: Case, shared_checkpoint: Any) -> None:
    """In one call or one after the other."""
    model = mergeable_model(case, shared_checkpoint)
    inputs = case.base.inputs(3)
    model.base_model.set_adapter(["default", "second"])
    both = run(model, inputs)
    model.merge_adapter()
    assert_close(run(model, inputs), both, factor=5)
    model.unmerge_adapter()
    assert torch.equal(run(model, inputs), both)
    if not case.sample.in_any_order:
        return
    model.merge_adapter(["second"])
    with pytest.warns(UserWarning, match="lready (merged|following adapters were merged)"):
        model.merge_adapter(["second", "default"])
    assert_close(run(model, inputs), both, factor=5)
    model.unmerge_adapter()
    assert torch.equal(run(model, inputs), both)


@together
def test_only_the_named_adapters_are_merged(case: Case, shared_checkpoint: Any) -> None:
    """A merged adapter takes effect whether it is active or not; the active one goes on beside it."""
    model = mergeable_model(case, shared_checkpoint)
    inputs = case.base.inputs(3)
    model.base_model.set_adapter(["default", "second"])
    both = run(model, inputs)
    model.set_adapter("default")
    model.merge_adapter(["second"])
    if case.sample.in_any_order:
        assert_close(run(model, inputs), both, factor=5)
    model.unmerge_adapter()
    model.set_adapter("second")
    alone = run(model, inputs)
    network = model.merge_and_unload(adapter_names=["second"])
    assert_close(run(network, inputs), alone, factor=3)


@every
def test_merged_and_unloaded_is_a_plain_model(case: Case, shared_checkpoint: Any) -> None:
    """The base's own object, classes and names; only values differ."""
    network = case.base.build()
    before = Snapshot.of(network)
    model = mergeable_model(case, shared_checkpoint, network)
    output = run(model, case.base.inputs(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that embeddings are no longer tied
        merged = model.merge_and_unload()
    assert merged is network
    assert_close(run(merged, case.base.inputs(3)), output, factor=3)
    now = Snapshot.of(network)
    assert now.classes == before.classes
    assert now.attributes == before.attributes
    assert now.state_keys == before.state_keys
    assert not hasattr(network, "peft_config")
    fresh = case.base.build()
    if not case.base.tied:
        fresh.load_state_dict(network.state_dict())
        assert_close(run(fresh, case.base.inputs(3)), output, factor=3)


@pytest.mark.parametrize(
    "case", list(option_cases(bases.LINEAR, bases.TRANSPOSED, bases.EMBEDDING, bases.CONV2D)), ids=str
)
def test_merging_with_every_option(case: Case, shared_checkpoint: Any) -> None:
    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    if not is_mergeable(model):
        pytest.skip("cannot be merged")
    inputs = case.base.inputs(3)
    before = run(model, inputs)
    model.merge_adapter()
    assert_close(run(model, inputs), before, factor=3)
    model.unmerge_adapter()
    assert torch.equal(run(model, inputs), before)
    assert_close(run(model.merge_and_unload(), inputs), before, factor=3)


@pytest.mark.parametrize("case", plain_cases(bases.LINEAR, bases.MIXED, bases.LLAMA), ids=str)
def test_a_head_saved_whole_stays_in_place(case: Case, shared_checkpoint: Any) -> None:
    """Merged in place its copy goes on computing; merged and unloaded it replaces the original."""
    if not case.saves_modules:
        pytest.skip("has no modules_to_save")
    model = mergeable_model(case, shared_checkpoint, modules_to_save=[case.base.head])
    inputs = case.base.inputs(3)
    before = run(model, inputs)
    trained = copy.deepcopy(model.base_model.placed["default"][case.base.head].module.state_dict())
    model.merge_adapter()
    assert_close(run(model, inputs), before, factor=3)
    model.unmerge_adapter()
    network = model.merge_and_unload()
    assert_close(run(network, inputs), before, factor=3)
    head = network.get_submodule(case.base.head)
    assert type(head) is nn.Linear
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in trained.items())


# -- half precision


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*kind_cases(), *plain_cases(bases.LLAMA)], ids=str)
def test_half_precision(case: Case, dtype: torch.dtype, autocast: bool, shared_checkpoint: Any) -> None:
    """As the reference: summed in float32 and rounded once."""
    folder = shared_checkpoint(case.base, case.config(), dtype=dtype)
    pair = load_both(case.base, folder, dtype=dtype, autocast_adapter_dtype=autocast)
    if not is_mergeable(pair.ours):
        pytest.skip("cannot be merged")
    values = {name: tensor.clone() for name, tensor in pair.ours.get_base_model().state_dict().items()}
    pair.each(lambda model: model.merge_adapter())
    theirs = dict(pair.reference.get_base_model().named_parameters())
    ours = pair.ours.get_base_model()
    for path in pair.ours.targeted_module_names:
        weight = ours.get_submodule(path).weight
        assert weight.dtype == dtype
        # One unit in the last place: the reference rounds the product before it adds it.
        assert_close(weight.detach(), theirs[f"{path}.base_layer.weight"].detach(), factor=0.5)
    pair.ours.unmerge_adapter()
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in values.items())


# -- shared weights


@pytest.mark.parametrize("case", plain_cases(bases.TIED), ids=str)
def test_merging_into_a_tied_embedding_leaves_the_other_end_alone(case: Case, shared_checkpoint: Any) -> None:
    network = case.base.build()
    tied = network.lm_head.weight
    value = tied.detach().clone()
    model = mergeable_model(case, shared_checkpoint, network)
    output = run(model, case.base.inputs(3))
    model.merge_adapter()
    assert network.lm_head.weight is tied
    assert torch.equal(tied, value)
    assert network.model.embed_tokens.weight is not tied
    assert_close(run(model, case.base.inputs(3)), output, factor=3)
    model.unmerge_adapter()
    assert network.model.embed_tokens.weight is network.lm_head.weight is tied


@pytest.mark.parametrize("case", plain_cases(bases.TIED), ids=str)
def test_no_longer_tied_after_the_merge(case: Case, shared_checkpoint: Any, tmp_path: Any) -> None:
    """The model says so, and can be saved and loaded by transformers with both weights."""
    model = mergeable_model(case, shared_checkpoint)
    output = run(model, case.base.inputs(3))
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        network = model.merge_and_unload()
    assert network.config.tie_word_embeddings is False
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path).eval()
    assert_close(run(again, case.base.inputs(3)), output, factor=3)


@pytest.mark.parametrize("case", plain_cases(bases.TIED), ids=str)
def test_still_tied_where_the_merge_left_both_ends(case: Case, shared_checkpoint: Any) -> None:
    config = case.config(target_modules=["q_proj"])
    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, config))
    network = model.merge_and_unload()
    assert network.config.tie_word_embeddings is True
    assert network.lm_head.weight is network.model.embed_tokens.weight


class SharedLayer(nn.Module):
    """One linear layer, called twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


def _shared_layer() -> nn.Module:
    torch.manual_seed(0)
    return SharedLayer().eval()


@linear
def test_a_layer_that_is_there_twice(case: Case, checkpoint: Any) -> None:
    """It is adapted once, under its first name, and merged once."""
    folder = checkpoint(_shared_layer, case.config(target_modules=["first"]))
    network = _shared_layer()
    before = Snapshot.of(network)
    model = splice.PeftModel.from_pretrained(network, folder)
    inputs = {"x": torch.randn(3, 6)}
    reference = peft.PeftModel.from_pretrained(_shared_layer(), str(folder))
    output = run(model, inputs)
    reference_network: Any = reference.get_base_model()
    reference_network.second = reference_network.first  # the reference wraps one of the two names
    assert_close(output, run(reference, inputs))
    if is_mergeable(model):
        model.merge_adapter()
        assert_close(run(model, inputs), output)
        model.unmerge_adapter()
    model.unload()
    before.assert_same(network)
    assert network.first is network.second


# -- what cannot be merged, and what goes wrong


def _break(model: Any, path: str, value: float = float("nan")) -> None:
    with torch.no_grad():
        for tensor in layer_parameters(model, "default", path):
            tensor.fill_(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every
def test_a_safe_merge_that_fails_changes_nothing(case: Case, value: float, shared_checkpoint: Any) -> None:
    """Also not the layers before the broken one."""
    network = case.base.build()
    model = mergeable_model(case, shared_checkpoint, network)
    before, inputs = snapshot_of_parameters(network), case.base.inputs(3)
    last = model.targeted_module_names[-1]
    _break(model, last, value)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="default") as raised:
            merge(safe_merge=True)
        assert "NaN" in str(raised.value)
        assert last in str(raised.value)
        now = snapshot_of_parameters(network)
        assert {name: identity for name, (identity, _) in now.items()} == {n: i for n, (i, _) in before.items()}
        assert all(torch.equal(tensor, before[name][1]) for name, (_, tensor) in now.items())
        assert not any(layer.splice_host.merged for layer in model.base_model.adapted.values())
        assert list(model.peft_config) == ["default", "second"]
    model.set_adapter("second")
    assert run(model, inputs).isfinite().all()


@linear
def test_an_unsafe_merge_takes_what_it_is_given(case: Case, shared_checkpoint: Any) -> None:
    model = mergeable_model(case, shared_checkpoint)
    _break(model, "second")
    model.merge_adapter()
    layer = model.get_base_model().second
    assert layer.weight.isnan().any() or layer.bias.isnan().any()
    model.unmerge_adapter()
    assert layer.weight.isfinite().all() and layer.bias.isfinite().all()


@linear
def test_merging_twice_warns_and_adds_nothing(case: Case, library: Any, shared_checkpoint: Any) -> None:
    if library is peft and not case.sample.reference_unmerges:
        pytest.skip("the reference cannot unmerge, and merges twice")
    folder = shared_checkpoint(case.base, case.config())
    model = library.PeftModel.from_pretrained(case.base.build(), str(folder))
    model.merge_adapter()
    merged = run(model, case.base.inputs(3))
    with pytest.warns(UserWarning, match="(?i)already (merged|following adapters were merged)"):
        model.merge_adapter()
    assert torch.equal(run(model, case.base.inputs(3)), merged)
    with pytest.warns(UserWarning, match="(?i)already (merged|following adapters were merged)"):
        network = model.merge_and_unload()
    assert torch.equal(run(network, case.base.inputs(3)), merged)


@linear
def test_unmerging_what_is_not_merged_warns(case: Case, library: Any, shared_checkpoint: Any) -> None:
    if library is peft and not case.sample.reference_unmerges:
        pytest.skip("the reference cannot unmerge, and merges twice")
    if library is peft and not case.sample.reference_tells:
        pytest.skip("the reference says nothing")
    folder = shared_checkpoint(case.base, case.config())
    model = library.PeftModel.from_pretrained(case.base.build(), str(folder))
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@linear
def test_names_as_a_string_are_refused(case: Case, library: Any, shared_checkpoint: Any) -> None:
    if library is peft and case.method.exclusive:
        pytest.skip("the reference looks for an adapter with the first letter's name")
    model = library.PeftModel.from_pretrained(case.base.build(), str(shared_checkpoint(case.base, case.config())))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match="list of strings"):
            merge(adapter_names="default")


@linear
def test_unknown_names_are_left_out(case: Case, library: Any, shared_checkpoint: Any) -> None:
    if library is peft and case.method.exclusive:
        pytest.skip("the reference raises a KeyError")
    model = library.PeftModel.from_pretrained(case.base.build(), str(shared_checkpoint(case.base, case.config())))
    before = run(model, case.base.inputs(3))
    with (
        nullcontext() if library is peft else pytest.warns(UserWarning, match="no adapter 'nobody' to merge; there are")
    ):
        model.merge_adapter(adapter_names=["nobody"])
    assert not model.get_base_model().first.merged
    assert torch.equal(run(model, case.base.inputs(3)), before)


@pytest.mark.parametrize("case", plain_cases(bases.GROUPED, bases.CIRCULAR), ids=str)
def test_what_is_no_change_of_the_weight_cannot_be_merged(case: Case, shared_checkpoint: Any) -> None:
    """Refused before the first layer has been changed; the message names the layer and the adapter."""
    network = case.base.build()
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(case.base, case.config()))
    if all(layer.mergeable for layer in model.base_model.placed["default"].values()):
        pytest.skip("can be merged")
    before, output = snapshot_of_parameters(network), run(model, case.base.inputs(3))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="default") as raised:
            merge()
        assert "first" in str(raised.value)
        assert "cannot be merged" in str(raised.value)
        now = snapshot_of_parameters(network)
        assert all(now[name][0] == identity for name, (identity, _) in before.items())
        assert torch.equal(run(model, case.base.inputs(3)), output)
    assert model.unload() is network


@pytest.mark.parametrize("case", plain_cases(bases.DILATED), ids=str)
def test_a_dilated_convolution_merged(case: Case, shared_checkpoint: Any) -> None:
    """The reference cannot run it at all; here the two ways to compute it agree."""
    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    inputs = case.base.inputs(3)
    output = run(model, inputs)
    assert differ(output, run(case.base.build(), inputs))
    if is_mergeable(model):
        model.merge_adapter()
        assert_close(run(model, inputs), output)


@pytest.mark.parametrize("case", [c for c in option_cases(bases.NO_BIAS) if c.config().get("lora_bias")], ids=str)
def test_an_update_with_a_bias_needs_a_bias_to_go_into(case: Case, shared_checkpoint: Any) -> None:
    network = case.base.build()
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(case.base, case.config()))
    before = snapshot_of_parameters(network)
    with pytest.raises(RuntimeError, match="bias") as raised:
        model.merge_adapter()
    assert "first" in str(raised.value)
    assert all(snapshot_of_parameters(network)[name][0] == identity for name, (identity, _) in before.items())


@linear
def test_deleting_a_merged_adapter_is_refused(case: Case, library: Any, shared_checkpoint: Any) -> None:
    if library is peft and not case.sample.reference_unmerges:
        pytest.skip("the reference cannot unmerge, and merges twice")
    model = library.PeftModel.from_pretrained(case.base.build(), str(shared_checkpoint(case.base, case.config())))
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert not model.peft_config


@linear
def test_activating_unmerges(case: Case, library: Any, shared_checkpoint: Any) -> None:
    if library is peft and not case.sample.reference_unmerges:
        pytest.skip("the reference cannot unmerge, and merges twice")
    model = library.PeftModel.from_pretrained(case.base.build(), str(shared_checkpoint(case.base, case.config())))
    model.load_adapter(str(shared_checkpoint(case.base, case.other_config(), seed=1)), adapter_name="second")
    model.set_adapter("second")
    second = run(model, case.base.inputs(3))
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="(?i)unmerg"):
        model.set_adapter("second")
    assert_close(run(model, case.base.inputs(3)), second)


@linear
def test_loading_and_adding_while_merged(case: Case, shared_checkpoint: Any) -> None:
    """A further adapter may come while another one is merged; new weights for the merged one may not."""
    model = mergeable_model(case, shared_checkpoint)
    inputs = case.base.inputs(3)
    before = run(model, inputs)
    model.merge_adapter()
    model.load_adapter(shared_checkpoint(case.base, case.other_config(), seed=2), "third")
    assert_close(run(model, inputs), before)
    with pytest.raises(ValueError, match="merged"):
        model.load_adapter(shared_checkpoint(case.base, case.config(), seed=3), "default")
    model.unmerge_adapter()
    assert torch.equal(run(model, inputs), before)


@linear
def test_a_merged_model_saves_the_adapter_as_it_was(case: Case, shared_checkpoint: Any, tmp_path: Any) -> None:
    model = mergeable_model(case, shared_checkpoint)
    before = {name: t.clone() for name, t in splice.get_peft_model_state_dict(model).items()}
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    again = splice.get_peft_model_state_dict(splice.PeftModel.from_pretrained(case.base.build(), tmp_path))
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


@linear
def test_a_merged_model_copied(case: Case, shared_checkpoint: Any) -> None:
    """The copy can be unmerged by itself."""
    model = mergeable_model(case, shared_checkpoint)
    inputs = case.base.inputs(3)
    before = run(model, inputs)
    model.merge_adapter()
    clone = copy.deepcopy(model)
    assert_close(run(clone, inputs), before)
    clone.unmerge_adapter()
    assert torch.equal(run(clone, inputs), before)
    assert model.get_base_model().first.merged
    Snapshot.of(case.base.build()).assert_same(clone.unload(), same_objects=False)


@linear
def test_merging_makes_nothing_trainable(case: Case, shared_checkpoint: Any) -> None:
    model = mergeable_model(case, shared_checkpoint)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.merge_adapter()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    model.unmerge_adapter()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@linear
def test_the_names_do_not_change_while_merged(case: Case, shared_checkpoint: Any) -> None:
    model = mergeable_model(case, shared_checkpoint)
    names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    model.merge_adapter()
    assert (list(model.state_dict()), [name for name, _ in model.named_parameters()]) == names


@linear
def test_a_progress_bar(case: Case, shared_checkpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    mergeable_model(case, shared_checkpoint).merge_and_unload(progressbar=True)
    assert "2/2" in capsys.readouterr().err
    mergeable_model(case, shared_checkpoint).merge_and_unload()
    assert not capsys.readouterr().err


@linear
def test_scales_count_in_a_merge(case: Case, shared_checkpoint: Any) -> None:
    """Merged with the scale that is set now."""
    model = mergeable_model(case, shared_checkpoint)
    layer = model.get_base_model().first
    if not getattr(layer, "scaling", None):
        pytest.skip("the method has no scale")
    before = run(model, case.base.inputs(3))
    layer.set_scale("default", 3.0)
    scaled = run(model, case.base.inputs(3))
    assert differ(scaled, before)
    model.merge_adapter()
    assert_close(run(model, case.base.inputs(3)), scaled)


@pytest.mark.parametrize("case", [case for case in kind_cases() if case.sample.merges], ids=str)
def test_a_merge_says_whether_it_changes_the_output(case: Case, shared_checkpoint: Any) -> None:
    """Where an adapter computes what no weight does, and nowhere else."""
    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    before = run(model, case.base.inputs(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_adapter()
    said = any("computes something on this layer that no weight does" in str(w.message) for w in caught)
    assert said == differ(run(model, case.base.inputs(3)), before)


# -- what is summed in pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 130])
def test_a_large_layer_is_merged_as_the_reference_merges_it(dtype: torch.dtype, rank: int) -> None:
    """So large that the product of its factors is never there as a whole."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(900, 701), nn.Linear(701, 900)).to(dtype)
    config = {"r": rank, "lora_alpha": 3, "target_modules": ["0", "1"], "init_lora_weights": False}
    model = splice.get_peft_model(copy.deepcopy(base), splice.LoraConfig(**config))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    peft.set_peft_model_state_dict(theirs, splice.get_peft_model_state_dict(model))
    model.merge_adapter()
    expected = theirs.merge_and_unload()
    for layer in ("0", "1"):
        own, other = base.get_submodule(layer), expected.get_submodule(layer)
        merged = model.base_model.model.get_submodule(layer).weight
        assert not torch.equal(merged, own.weight)
        torch.testing.assert_close(merged, other.weight)
    model.unmerge_adapter()
    for layer in ("0", "1"):
        assert torch.equal(model.base_model.model.get_submodule(layer).weight, base.get_submodule(layer).weight)
