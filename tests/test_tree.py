"""The names that a model tells are those of its tree of modules, whatever was done to it, and whoever walks it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from splice.checkpoint.keys import PREFIX
from tests import bases
from tests.bases import run
from tests.comparing import differ, load_both
from tests.samples import Case, as_stored, kind_cases, network_cases, parameter_cases, plain_cases

NETWORKS = as_stored(network_cases(bases.LLAMA))
ALL = [*kind_cases(), *plain_cases(bases.LLAMA, bases.T5), *NETWORKS, *parameter_cases(bases.EXPERTS)]
every = pytest.mark.parametrize("case", ALL, ids=str)
kinds = pytest.mark.parametrize("case", [*kind_cases(), *NETWORKS], ids=str)


# For methods on bare parameters: what they target.
PARAMETERS = {bases.EXPERTS.name: {"target_modules": [], "target_parameters": ["up", "down"]}}


def loaded(case: Case, checkpoint: Any, name: str = "default", **options: Any) -> Any:
    own = PARAMETERS.get(case.base.name, {})
    folder = checkpoint(case.base, case.config(modules_to_save=[case.base.head], **own))
    return splice.PeftModel.from_pretrained(case.base.build(), folder, adapter_name=name, **options)


def walk(module: nn.Module, front: str = "") -> tuple[dict[str, nn.Parameter], dict[str, torch.Tensor], list[str]]:
    """Parameters, buffers that a state dict holds, and modules, found by the registries alone; shared ones each time."""
    parameters = {front + name: p for name, p in module._parameters.items() if p is not None}
    lasting = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
    buffers = {front + name: module._buffers[name] for name in lasting if module._buffers[name] is not None}
    modules = [front.removesuffix(".")]
    for name, child in module._modules.items():
        if child is not None:
            below = walk(child, f"{front}{name}.")
            parameters |= below[0]
            buffers |= below[1]
            modules += below[2]
    return parameters, buffers, modules


def assert_names_agree(model: nn.Module) -> None:
    parameters, buffers, modules = walk(model)
    told = dict(model.named_parameters(remove_duplicate=False))
    assert told.keys() == parameters.keys()
    assert all(told[name] is parameter for name, parameter in parameters.items())
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == modules
    assert set(model.state_dict()) == parameters.keys() | buffers.keys()
    assert {name for name, _ in model.named_buffers(remove_duplicate=False)} >= buffers.keys()
    for name, parameter in parameters.items():
        assert model.get_parameter(name) is parameter, name


def _and_back(change: str) -> Callable[[Any], Any]:
    def run_it(model: Any) -> Any:
        getattr(model, change)()
        return model

    return run_it


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: model,
    "to": lambda model: model.to(torch.float64),
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "loaded state": lambda model: (model.load_state_dict(model.state_dict()), model)[1],
    "assigned state": lambda model: (
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True),
        model,
    )[1],
}


@pytest.mark.parametrize("change", CHANGES, ids=str)
@every
def test_names_are_the_trees(case: Case, change: str, shared_checkpoint: Any) -> None:
    """Of the PeftModel, of the network below it and of every submodule; also of two adapters, one with dots in its name."""
    model = loaded(case, shared_checkpoint)
    own = PARAMETERS.get(case.base.name, {})
    model.load_adapter(shared_checkpoint(case.base, case.other_config(**own), seed=1), "with.dots")
    before = run(model, case.base.inputs(2))
    changed = CHANGES[change](model)
    assert_names_agree(changed)
    assert_names_agree(changed.get_base_model())
    for module in changed.get_base_model().modules():
        assert dict(module.named_parameters(remove_duplicate=False)).keys() == walk(module)[0].keys()
    if change != "to":
        assert torch.equal(run(changed, case.base.inputs(2)), before)


@every
def test_names_after_merging_and_taking_off(case: Case, shared_checkpoint: Any) -> None:
    model = loaded(case, shared_checkpoint)
    names = list(case.base.build().state_dict())
    if case.method.network_layer is None:
        try:
            model.merge_adapter()
        except NotImplementedError:
            pass
        else:
            assert_names_agree(model)
            model.unmerge_adapter()
            assert_names_agree(model)
    model.delete_adapter("default")
    assert_names_agree(model)
    assert list(model.get_base_model().state_dict()) == names


@every
def test_unloaded_nothing_is_left_on_what_was_around_the_base(case: Case, shared_checkpoint: Any) -> None:
    model = loaded(case, shared_checkpoint)
    network = model.unload()
    assert [name for name, _ in model.named_modules()] == [
        *("", "base_model", "base_model.model"),
        *(f"base_model.model.{name}" for name, _ in network.named_modules() if name),
    ]
    assert {id(tensor) for tensor in model.state_dict(keep_vars=True).values()} == {
        id(tensor) for tensor in network.state_dict(keep_vars=True).values()
    }


@every
def test_exchanged_parameters_are_the_ones_that_compute(case: Case, shared_checkpoint: Any) -> None:
    """Whoever puts another Parameter object into the tree has it used: nothing keeps the old one."""
    model = loaded(case, shared_checkpoint)
    before = run(model, case.base.inputs(2))
    for placed in model.base_model.placed.values():
        for layer in placed.values():
            for registry, name, slot in layer.registered.values():
                if slot.stored and registry[name].is_floating_point():
                    tensor = registry[name]
                    other = (tensor.detach() * 1.5).clone()
                    registry[name] = nn.Parameter(other) if isinstance(tensor, nn.Parameter) else other
    assert differ(run(model, case.base.inputs(2)), before)


@kinds
def test_functional_call(case: Case, shared_checkpoint: Any) -> None:
    model = loaded(case, shared_checkpoint)
    inputs = case.base.inputs(2)
    expected = run(model, inputs)
    state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    with torch.no_grad():
        output = torch.func.functional_call(model, state, kwargs=inputs)
    assert torch.equal(_tensor(output), expected)
    changed = {n: t * 2 if t is not None and "default" in n.split(".") else t for n, t in state.items()}
    with torch.no_grad():
        other = torch.func.functional_call(model, changed, kwargs=inputs)
    assert differ(_tensor(other), expected)
    assert torch.equal(run(model, inputs), expected)


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


# -- those who walk the tree


@pytest.mark.parametrize("case", plain_cases(bases.LLAMA), ids=str)
def test_trainers_decay_groups_are_the_references(case: Case, shared_checkpoint: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    folder = shared_checkpoint(case.base, case.config())
    pair = load_both(case.base, folder, is_trainable=True)
    sizes = []
    for model in (pair.reference, pair.ours):
        arguments = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.5, report_to=[], use_cpu=True)
        groups = Trainer(model, arguments).create_optimizer().param_groups
        sizes.append({g["weight_decay"]: sorted(tuple(p.shape) for p in g["params"]) for g in groups})
    assert sizes[0] == sizes[1]
    assert sum(map(len, sizes[1].values()))


@pytest.mark.parametrize("of_network", [False, True], ids=["PeftModel", "bare network"])
@pytest.mark.parametrize("case", [*plain_cases(bases.LLAMA), *NETWORKS], ids=str)
def test_a_distributed_checkpoint_goes_round(
    case: Case, of_network: bool, shared_checkpoint: Any, tmp_path: Path
) -> None:
    """Model and optimizer, by `torch.distributed.checkpoint`, into a model with other values."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def made(seed: int) -> tuple[Any, Any, torch.optim.Optimizer]:
        folder = shared_checkpoint(case.base, case.config(), seed=seed)
        model = splice.PeftModel.from_pretrained(case.base.build(), folder, is_trainable=True)
        inputs = case.base.inputs(2)
        _tensor(model(**inputs)).float().sum().backward()
        # Some methods have tensors that nothing reads, and an optimizer has nothing to say of these.
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.grad is not None], lr=1e-2)
        optimizer.step()
        optimizer.zero_grad()
        return model, model.get_base_model() if of_network else model, optimizer

    if of_network and case.method.network_layer is not None:
        pytest.skip("its tensors stand in the PeftModel, so the network has none of the optimizer's")
    source, module, optimizer = made(0)
    state, moments = get_state_dict(module, optimizer)
    dcp.save({"model": state, "optimizer": moments}, checkpoint_id=tmp_path)
    target, other, other_optimizer = made(1)
    assert differ(run(target, case.base.inputs(2)), run(source, case.base.inputs(2)))
    state, moments = get_state_dict(other, other_optimizer)
    dcp.load({"model": state, "optimizer": moments}, checkpoint_id=tmp_path)
    result = set_state_dict(other, other_optimizer, model_state_dict=state, optim_state_dict=moments)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(run(target, case.base.inputs(2)), run(source, case.base.inputs(2)))
    for ours, theirs in zip(optimizer.state.values(), other_optimizer.state.values()):
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])


def _exported() -> Iterator[Any]:
    """Strict export captures as compiling does, which tests/test_training.py has of each method: here of those that stand
    for their kinds, and of the others in the slow tests."""
    for case in plain_cases(bases.LINEAR):
        for strict in (True, False):
            marks = () if case.sample.on_every_base or not strict else pytest.mark.slow
            yield pytest.param(case, strict, id=f"{case}-{'strict' if strict else 'traced'}", marks=marks)


@pytest.mark.parametrize(("case", "strict"), list(_exported()))
def test_export(case: Case, strict: bool, shared_checkpoint: Any) -> None:
    model = loaded(case, shared_checkpoint)
    network, inputs = model.get_base_model(), case.base.inputs(2)
    buffers = [id(buffer) for _, buffer in network.named_buffers(remove_duplicate=False)]
    if strict and torch.__version__ < (2, 7) and len(set(buffers)) < len(buffers):
        pytest.skip("torch 2.6 cannot: neither of two BatchNorm1d that share a buffer")
    exported = torch.export.export(network, (), inputs, strict=strict)
    assert torch.allclose(_tensor(exported.module()(**inputs)), run(model, inputs), atol=1e-6)
    assert any("default" in name for name in exported.state_dict)


@pytest.mark.parametrize("where", ["dispatch_model", "cpu_offload"])
@pytest.mark.parametrize("case", plain_cases(bases.LLAMA), ids=str)
def test_accelerate_after_a_load(case: Case, where: str, shared_checkpoint: Any) -> None:
    import accelerate

    model = loaded(case, shared_checkpoint)
    expected = run(model, case.base.inputs(2))
    if where == "dispatch_model":
        model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(run(model, case.base.inputs(2)), expected)


@pytest.mark.parametrize("case", plain_cases(bases.LLAMA), ids=str)
def test_a_state_dict_of_the_reference_is_understood(case: Case, shared_checkpoint: Any) -> None:
    """`base_layer.weight` and its like, by the PeftModel and by the bare network; two spellings that differ are refused."""
    first, second = (shared_checkpoint(case.base, case.config(), seed=seed) for seed in (0, 1))
    theirs = peft.PeftModel.from_pretrained(case.base.build(), str(second))
    ours = splice.PeftModel.from_pretrained(case.base.build(), first)
    expected = run(theirs, case.base.inputs(2))
    result = ours.load_state_dict(theirs.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.allclose(run(ours, case.base.inputs(2)), expected, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", [*kind_cases(), *plain_cases(bases.LLAMA)], ids=str)
def test_two_spellings_of_a_base_tensor(case: Case, strict: bool, shared_checkpoint: Any) -> None:
    """Equal ones are one; others are refused before anything is loaded, by whichever module is asked to load."""
    model = loaded(case, shared_checkpoint)
    path, layer = list(model.base_model.adapted.items())[-2]
    infix = next(a.names.base for a in layer.splice_host.layers.values())
    name = next(n for n, p in layer._parameters.items() if p is not None)
    modules = {"": model, PREFIX: model.get_base_model()}
    while path:  # all that is above the layer, and the layer itself
        modules[f"{PREFIX}{path}."] = model.get_base_model().get_submodule(path)
        path = path.rpartition(".")[0]
    front = max(modules, key=len)
    for prefix, module in modules.items():
        state = module.state_dict()
        before = {key: tensor.clone() for key, tensor in state.items()}
        others = {key: tensor + 1 for key, tensor in before.items()}
        own, theirs = (front + name)[len(prefix) :], (front + infix + name)[len(prefix) :]
        with pytest.raises(RuntimeError, match="two spellings") as raised:
            module.load_state_dict({**others, theirs: before[own]}, strict=strict)
        assert repr(own) in str(raised.value)
        assert repr(theirs) in str(raised.value)
        assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
        result = module.load_state_dict({**others, theirs: others[own]}, strict=strict)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert all(torch.equal(tensor, others[key]) for key, tensor in module.state_dict().items())
        module.load_state_dict(before)
    network = model.unload()
    assert not any(module._load_state_dict_pre_hooks for module in network.modules())


@every
def test_a_models_own_state_is_no_two_spellings(case: Case, shared_checkpoint: Any) -> None:
    """Also with trained biases, whose names are those that the reference has for the base's."""
    biases = {} if "bias" not in case.config() and case.method.name.value != "LORA" else {"bias": "all"}
    own = PARAMETERS.get(case.base.name, {})
    folder = shared_checkpoint(case.base, case.config(**own, **({} if own else biases)))
    model = splice.PeftModel.from_pretrained(case.base.build(), folder)
    for module in (model, model.get_base_model(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        others = {name: tensor + 1 for name, tensor in module.state_dict().items()}
        state = copy.copy(others)
        result = module.load_state_dict(state)
        assert state.keys() == others.keys()
        assert not result.missing_keys
        assert all(torch.equal(tensor, others[name]) for name, tensor in module.state_dict().items())


def test_versions_and_metadata_of_a_state_dict_are_kept(shared_checkpoint: Any) -> None:
    case = plain_cases(bases.LLAMA)[0]
    model = loaded(case, shared_checkpoint)
    state = model.state_dict()
    assert {"version": 1} in state._metadata.values()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=True)
    model.load_state_dict(again)
    assert again._metadata == state._metadata
