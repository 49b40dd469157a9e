"""Merging changes values and no objects, whatever becomes of the model in the meantime, and wherever it is cut short."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splice
from splice.base.dense import exchange
from splice.kinds.module_copy import WholeModule
from splice.surgery import putting
from tests import bases
from tests.bases import run
from tests.comparing import Snapshot, assert_close, base_parameters
from tests.samples import Case, kind_cases, plain_cases
from tests.test_merging import mergeable_model, snapshot_of_parameters

kinds = pytest.mark.parametrize("case", kind_cases(), ids=str)
linear = pytest.mark.parametrize("case", plain_cases(bases.LINEAR), ids=str)
tied = pytest.mark.parametrize("case", plain_cases(bases.TIED), ids=str)


def _by_hand(network: nn.Module, dtype: torch.dtype) -> None:
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


CASTS: dict[str, Callable[[nn.Module, torch.dtype], object]] = {
    "to": lambda model, dtype: model.to(dtype),
    "by hand": _by_hand,
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@kinds
def test_unmerged_in_the_dtype_that_the_model_has_by_then(
    case: Case, dtype: torch.dtype, cast: str, shared_checkpoint: Any
) -> None:
    network = case.base.build()
    model = mergeable_model(case, shared_checkpoint, network)
    before = snapshot_of_parameters(network)
    model.merge_adapter()
    CASTS[cast](model, dtype)
    model.unmerge_adapter()
    now = snapshot_of_parameters(network)
    assert now.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert now[name][0] == identity
        assert now[name][1].dtype is dtype
        assert torch.equal(now[name][1], value.to(dtype)), name


@tied
def test_tied_ends_in_the_dtype_that_the_model_has_by_then(case: Case, shared_checkpoint: Any) -> None:
    network = case.base.build()
    value = network.lm_head.weight.detach().clone()
    model = mergeable_model(case, shared_checkpoint, network)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert torch.equal(network.lm_head.weight, value.to(torch.bfloat16))


@tied
def test_a_tied_layer_told_alone_leaves_the_other_end_alone(case: Case, shared_checkpoint: Any) -> None:
    """Also in a copy of the model, and in one that was pickled, whose layers know of no network."""
    model = mergeable_model(case, shared_checkpoint)
    for own in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        network = own.get_base_model()
        output, weight = run(own, case.base.inputs(3)), network.lm_head.weight
        value = weight.detach().clone()
        for layer in own.base_model.adapted.values():
            layer.merge()
        assert network.lm_head.weight is weight
        assert torch.equal(weight, value)
        assert_close(run(own, case.base.inputs(3)), output, factor=3)
        for layer in own.base_model.adapted.values():
            layer.unmerge()
        assert torch.equal(run(own, case.base.inputs(3)), output)
        assert network.model.embed_tokens.weight is network.lm_head.weight


@linear
def test_a_layer_told_alone_keeps_its_parameter(case: Case, shared_checkpoint: Any) -> None:
    model = mergeable_model(case, shared_checkpoint)
    for own in (model, copy.deepcopy(model)):
        layer = own.get_base_model().first
        name = own.base_model.placed["default"]["first"].changed_names[0]
        changed = layer._parameters[name]
        value = changed.detach().clone()
        layer.merge()
        assert layer._parameters[name] is changed
        assert not torch.equal(changed, value)
        layer.unmerge()
        assert layer._parameters[name] is changed
        assert torch.equal(changed, value)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@kinds
def test_a_merged_model_copied_or_pickled(case: Case, copied: Callable[[Any], Any], shared_checkpoint: Any) -> None:
    model = mergeable_model(case, shared_checkpoint)
    inputs = case.base.inputs(3)
    before = run(model, inputs)
    model.merge_adapter()
    clone = copied(model)
    clone.unmerge_adapter()
    assert torch.equal(run(clone, inputs), before)
    assert next(iter(model.base_model.adapted.values())).merged


class Cut(BaseException):
    """What cuts a merge short: no error of the program's own, as Ctrl-C is none."""


def _cut_at_last_layer(model: Any, monkeypatch: pytest.MonkeyPatch, name: str = "default") -> None:
    def cut(*_: object) -> None:
        raise Cut

    layer = list(model.base_model.placed[name].values())[-1]
    monkeypatch.setattr(layer, "deltas", cut)


def _cut_at_first_exchange(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it has been made; those that put the values back are not cut."""

    def cut(parameter: nn.Parameter, values: torch.Tensor) -> torch.Tensor:
        exchange(parameter, values)
        raise Cut

    calls = iter([cut])
    monkeypatch.setattr(putting, "exchange", lambda *given: next(calls, exchange)(*given))


@pytest.mark.parametrize("cut", [_cut_at_last_layer, _cut_at_first_exchange])
@kinds
def test_a_merge_that_is_cut_short_changes_nothing(
    case: Case, cut: Callable[..., None], shared_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole model, and of one layer told alone."""
    network = case.base.build()
    model = mergeable_model(case, shared_checkpoint, network)
    for merge in (model.merge_adapter, *(layer.merge for layer in model.base_model.adapted.values())):
        before, output = Snapshot.of(network), run(model, case.base.inputs(3))
        with monkeypatch.context() as patch:
            cut(model, patch)
            try:
                merge()
            except Cut:
                before.assert_same(network)
                assert not model.base_model.merged
                assert torch.equal(run(model, case.base.inputs(3)), output)
            else:
                model.unmerge_adapter()


@linear
def test_a_second_merge_that_is_cut_short_leaves_the_first(
    case: Case, shared_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = case.base.build()
    model = mergeable_model(case, shared_checkpoint, network)
    if case.method.exclusive:
        pytest.skip("one adapter at a time")
    original = snapshot_of_parameters(network)
    model.merge_adapter(["second"])
    before, output = Snapshot.of(network), run(model, case.base.inputs(3))
    with monkeypatch.context() as patch:
        _cut_at_last_layer(model, patch)
        with pytest.warns(UserWarning, match="lready (merged|following adapters were merged)"), pytest.raises(Cut):
            model.merge_adapter(["default"])
    before.assert_same(network)
    assert model.base_model.merged == ["second"]
    assert torch.equal(run(model, case.base.inputs(3)), output)
    model.unmerge_adapter()
    assert all(torch.equal(value, original[name][1]) for name, (_, value) in snapshot_of_parameters(network).items())


@linear
def test_merging_for_good_cut_short_computes_the_same_and_can_be_finished(
    case: Case, shared_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights from before are gone, and nothing says otherwise."""
    model = mergeable_model(case, shared_checkpoint)
    output = run(model, case.base.inputs(3))
    with monkeypatch.context() as patch, pytest.raises(Cut):
        _cut_at_last_layer(model, patch)
        model.merge_and_unload()
    assert_close(run(model, case.base.inputs(3)), output, factor=3)
    for back in (model.unmerge_adapter, model.unload):
        with pytest.raises(RuntimeError, match="'first'.*cut short.*again"):
            back()
    assert_close(run(model, case.base.inputs(3)), output, factor=3)
    with pytest.warns(UserWarning, match="lready (merged|following adapters were merged)"):
        network = model.merge_and_unload()
    assert_close(run(network, case.base.inputs(3)), output, factor=3)


@linear
def test_what_one_layer_has_merged_keeps_no_other_from_it(case: Case, shared_checkpoint: Any) -> None:
    model = mergeable_model(case, shared_checkpoint)
    output = run(model, case.base.inputs(3))
    model.get_base_model().first.merge()
    with pytest.warns(UserWarning, match="lready (merged|following adapters were merged)"):
        network = model.merge_and_unload()
    assert_close(run(network, case.base.inputs(3)), output, factor=3)


@linear
def test_a_backward_that_began_before_a_merge_is_refused(case: Case, shared_checkpoint: Any) -> None:
    """With the merged values its gradients would be others; where those are not needed, they are right."""
    model = mergeable_model(case, shared_checkpoint)
    x = case.base.inputs(3)["x"].requires_grad_()
    (expected,) = torch.autograd.grad(model(x=x).sum(), x)
    output = model(x=x).sum()
    model.merge_adapter()
    layer = model.base_model.placed["default"]["first"]
    if not isinstance(layer, WholeModule) and "weight" in layer.changed_names:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()
        return
    output.backward()
    assert torch.equal(x.grad, expected)


@linear
def test_merged_in_inference_mode_the_model_can_still_be_trained(case: Case, shared_checkpoint: Any) -> None:
    network = case.base.build()
    model = mergeable_model(case, shared_checkpoint, network)
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            model.merge_adapter()
        assert not any(parameter.is_inference() for parameter in network.parameters())
        with mode():
            model.unmerge_adapter()
    model.set_adapter("default")
    model(**case.base.inputs(3)).sum().backward()


@linear
def test_parameters_exchanged_while_merged_get_the_values_back(case: Case, shared_checkpoint: Any) -> None:
    """`load_state_dict(assign=True)` puts other objects in the tree; these stay."""
    network = case.base.build()
    model = mergeable_model(case, shared_checkpoint, network)
    before = snapshot_of_parameters(network)
    model.merge_adapter()
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    held = base_parameters(network)
    model.unmerge_adapter()
    now = base_parameters(network)
    assert all(now[name] is held[name] for name in held)
    assert all(torch.equal(now[name], value) for name, (_, value) in before.items())


@pytest.mark.parametrize("case", [case for case in plain_cases(bases.LLAMA) if case.sample.merges], ids=str)
def test_flags_after_merging_for_good_are_the_bases_own(case: Case, shared_checkpoint: Any) -> None:
    network = case.base.build()
    flags = {name: p.requires_grad for name, p in network.named_parameters()}
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(case.base, case.config()))
    model.merge_and_unload()
    assert {name: p.requires_grad for name, p in network.named_parameters()} == flags


def test_sharded_parameters_keep_their_objects(tmp_path: Path) -> None:
    """Such a tensor holds another one, which FSDP knows: it is written to, and none takes its place."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        values = torch.randn(3, 4)
        parameter = nn.Parameter(DTensor.from_local(values.clone(), mesh, [Replicate()]))
        held = parameter.to_local()
        before = exchange(parameter, parameter.detach() + 1)
        assert torch.equal(held, values + 1)
        exchange(parameter, before)
        assert torch.equal(held, values)
    finally:
        dist.destroy_process_group()
