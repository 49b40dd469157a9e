"""Training, and everything that torch and accelerate do to a model: the adapters take part as any layer does."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import splice
from tests import bases
from tests.bases import Inputs, run
from tests.comparing import (
    Pair,
    Snapshot,
    assert_close,
    base_parameters,
    differ,
    layer_parameters,
    load_both,
    named,
    parameters_of,
)
from tests.ranks import on_ranks
from tests.samples import Case, kind_cases, plain_cases

MODELS = (bases.LINEAR, bases.EMBEDDING, bases.CONV2D, bases.MIXED, bases.LLAMA, bases.BERT, bases.T5)
models = pytest.mark.parametrize("case", plain_cases(*MODELS), ids=str)
few = pytest.mark.parametrize("case", plain_cases(bases.LINEAR, bases.LLAMA), ids=str)
linear = pytest.mark.parametrize("case", plain_cases(bases.LINEAR), ids=str)


def loss_of(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    output = bases.tensors_of(model(**inputs))[0]
    target = torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)
    return F.mse_loss(output, target.expand_as(output))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: nn.Module, inputs: Inputs, steps: int = 10) -> list[float]:
    """The losses of a few steps."""
    torch.manual_seed(0)
    optimizer = adamw(model)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- steps of an optimizer


@models
def test_trained_saved_and_loaded_bit_for_bit(case: Case, tmp_path: Path) -> None:
    """Ten steps from a new adapter; only the adapter learns; a fresh base with the saved adapter is the same model."""
    config = case.config(modules_to_save=[case.base.head])
    model = splice.get_peft_model(case.base.build(), splice.get_peft_config(config))
    frozen = {name: parameter.clone() for name, parameter in base_parameters(model.get_base_model()).items()}
    losses = train(model.train(), case.base.inputs(4))
    assert losses[-1] < losses[0]
    assert all(torch.equal(base_parameters(model.get_base_model())[name], value) for name, value in frozen.items())
    model.save_pretrained(tmp_path)
    expected = run(model.eval(), case.base.inputs(3))
    for trainable in (False, True):
        again = splice.PeftModel.from_pretrained(case.base.build(), tmp_path, is_trainable=trainable)
        assert torch.equal(run(again.eval(), case.base.inputs(3)), expected)


@models
def test_the_steps_are_those_of_the_reference(case: Case, shared_checkpoint: Any) -> None:
    folder = shared_checkpoint(case.base, case.config(modules_to_save=[case.base.head]))
    pair = load_both(case.base, folder, is_trainable=True)
    losses = [train(model.train(), case.base.inputs(4), steps=5) for model in (pair.reference, pair.ours)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    theirs = dict(named(pair.reference))
    for name, parameter in named(pair.ours):
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-3, atol=1e-4)


@models
def test_dropout_in_training_mode_alone(case: Case, shared_checkpoint: Any) -> None:
    """With the same random numbers the outputs are the reference's, so it sits in the same place."""
    if "lora_dropout" not in vars(splice.get_peft_config(case.config())):
        pytest.skip("the method has no dropout")
    config = case.config(lora_dropout=0.5)
    pair = load_both(case.base, shared_checkpoint(case.base, config), is_trainable=True)
    pair.each(lambda model: model.eval())
    evaluated = pair.assert_equal()
    assert torch.equal(pair.outputs()[1], evaluated)
    outputs = []
    for model in (pair.reference, pair.ours):
        model.train()
        torch.manual_seed(5)
        outputs.append(run(model, case.base.inputs(3)))
    assert_close(outputs[1], outputs[0])
    if case.base is not bases.EMBEDDING:  # token ids are not dropped
        assert differ(run(pair.ours, case.base.inputs(3)), run(pair.ours, case.base.inputs(3)))
    pair.each(lambda model: model.eval())
    assert torch.equal(pair.outputs()[1], evaluated)


@few
def test_dropout_follows_the_mode_of_its_adapters_layer(case: Case, shared_checkpoint: Any) -> None:
    """An adapter that is loaded into a model in training mode, or whose model changes mode later."""
    if "lora_dropout" not in vars(splice.get_peft_config(case.config())):
        pytest.skip("the method has no dropout")
    inputs = case.base.inputs(3)
    network = case.base.build().train()
    fields = case.config(inference_mode=case.sample.one_trained)
    model = splice.get_peft_model(network, splice.get_peft_config(fields))
    folder = shared_checkpoint(case.base, case.config(lora_dropout=0.5))
    model.load_adapter(folder, "second", is_trainable=True)
    model.set_adapter("second")
    assert network.training
    assert differ(run(model, inputs), run(model, inputs))
    network.eval()  # on the base model, not on the facade
    assert torch.equal(run(model, inputs), run(model, inputs))
    model.train()
    assert differ(run(model, inputs), run(model, inputs))
    model.load_adapter(folder, "third")
    assert torch.equal(run(model, inputs), run(model, inputs))


@few
def test_only_the_active_adapter_learns(case: Case, shared_checkpoint: Any) -> None:
    folder = shared_checkpoint(case.base, case.config())
    model = splice.PeftModel.from_pretrained(case.base.build(), folder, is_trainable=True)
    model.load_adapter(folder, "second")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, case.base.inputs(3), steps=2)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all("default" in name.split(".") for name in changed)
    assert torch.equal(model.get_base_model()(**case.base.inputs(1))[0], model(**case.base.inputs(1))[0])


@linear
def test_an_optimizer_keeps_its_tensors_through_loads(case: Case, shared_checkpoint: Any) -> None:
    """New weights for the adapter, other adapters, disabling and merging: the parameters stay the same objects."""
    model = splice.PeftModel.from_pretrained(
        case.base.build(), shared_checkpoint(case.base, case.config()), is_trainable=True
    )
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    model.load_adapter(shared_checkpoint(case.base, case.config(), seed=3), "default")
    model.load_adapter(shared_checkpoint(case.base, case.other_config(), seed=1), "second")
    model.set_adapter("second")
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    if case.sample.merges:
        model.merge_adapter()
        model.unmerge_adapter()
    model.load_state_dict(model.state_dict())
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained


@few
def test_half_precision_training(case: Case, shared_checkpoint: Any) -> None:
    """The adapter of a bfloat16 base is trained in float32, unless it is whole modules of the base."""
    folder = shared_checkpoint(case.base, case.config(), dtype=torch.bfloat16)
    pair = load_both(case.base, folder, dtype=torch.bfloat16, is_trainable=True)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in case.base.inputs(4).items()}
    losses = [train(model.train(), inputs, steps=3) for model in (pair.reference, pair.ours)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert {p.dtype for p in pair.ours.parameters() if p.requires_grad} == {case.sample.trained_in}


# -- what torch does with a model


def _checkpointed() -> Iterator[Any]:
    """In the quick tests each switch both ways for every method, and all four ways for those that stand for their kinds."""
    for case in plain_cases(bases.LLAMA, bases.BERT, bases.T5):
        for before in (True, False):
            for reentrant in (True, False):
                name = f"{case}-switched on {'before' if before else 'after'}-{reentrant}"
                quick = case.sample.on_every_base or before != reentrant
                yield pytest.param(case, before, reentrant, id=name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("case", "before", "reentrant"), list(_checkpointed()))
def test_gradient_checkpointing(case: Case, before: bool, reentrant: bool, shared_checkpoint: Any) -> None:
    """The same gradients as without, and as in the reference with the same switch."""
    folder = shared_checkpoint(case.base, case.config())
    expected = splice.PeftModel.from_pretrained(case.base.build(), folder, is_trainable=True).train()
    torch.manual_seed(0)
    loss_of(expected, case.base.inputs(3)).backward()
    found = []
    for library in (peft, splice):
        network = case.base.build()
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        if before:
            network.gradient_checkpointing_enable(**options)
        model = library.PeftModel.from_pretrained(network, str(folder), is_trainable=True)
        if not before:
            model.gradient_checkpointing_enable(**options)
            model.enable_input_require_grads()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            loss_of(model.train(), case.base.inputs(3)).backward()
        found.append({name: p.grad for name, p in named(model) if p.requires_grad})
    for name, parameter in named(expected):
        if parameter.requires_grad:
            assert found[0][name] is not None
            assert found[1][name] is not None, name
            assert_close(found[1][name], parameter.grad, factor=10)


def _compiled() -> Iterator[Any]:
    """Each method on every kind of layer by each backend, which takes a second or two.

    In the quick tests every method is on its first kind, and those that stand for their kinds on all of them, by the backend
    that goes on where the other one ends: it takes the same graph and traces it once more.
    """
    methods = set()
    for case in kind_cases():
        first = case.method.name not in methods
        methods.add(case.method.name)
        for backend in ("eager", "aot_eager"):
            quick = backend == "aot_eager" and (first or case.sample.on_every_base)
            yield pytest.param(case, backend, id=f"{case}-{backend}", marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("case", "backend"), list(_compiled()))
def test_compiled_in_one_graph(case: Case, backend: str, shared_checkpoint: Any) -> None:
    """And one that stays right: after the weights change in place, after another adapter, after disabling."""
    torch._dynamo.reset()
    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    model.load_adapter(shared_checkpoint(case.base, case.other_config(), seed=1), "second")
    network = model.get_base_model()
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    inputs = case.base.inputs(3)

    def assert_same() -> torch.Tensor:
        with torch.no_grad():
            assert_close(compiled(**inputs), network(**inputs))
            return network(**inputs)

    first = assert_same()
    with torch.no_grad():
        for parameter in layer_parameters(model, "default", "first"):
            parameter.mul_(1.5).add_(0.3)  # of some tensors only the direction counts
    changed = assert_same()
    assert differ(changed, first)
    model.set_adapter("second", inference_mode=True)
    assert differ(assert_same(), changed)
    model.set_adapter("default", inference_mode=True)
    assert torch.equal(assert_same(), changed)
    with model.disable_adapter():
        assert torch.equal(assert_same(), run(case.base.build(), inputs))
    if not case.method.exclusive:
        model.base_model.set_adapter(["default", "second"], inference_mode=True)
        assert differ(assert_same(), changed)


@linear
def test_a_compiled_graph_is_not_made_again(case: Case, shared_checkpoint: Any) -> None:
    """In-place changes of the adapter, and loads of other adapters, leave it valid."""
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: Any, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend=backend)
    inputs = case.base.inputs(3)
    with torch.no_grad():
        for _ in range(3):
            compiled(**inputs)
            for parameter in model.parameters():
                parameter.mul_(1.01)
    model.load_adapter(shared_checkpoint(case.base, case.config(), seed=3), "default")
    assert_close(run(compiled, inputs), run(model, inputs))
    assert graphs == 1


@linear
def test_the_graph_of_a_first_call_is_not_made_again(case: Case, shared_checkpoint: Any) -> None:
    """Of a thread that has called nothing before; nor do adapters on layers of another class make it invalid."""
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: Any, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    class Another(torch.nn.Linear):
        pass

    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend=backend)
    inputs, found = case.base.inputs(3), []

    def calls() -> None:
        found.append(run(compiled, inputs))
        splice.get_peft_model(torch.nn.Sequential(Another(2, 2)), splice.LNTuningConfig(target_modules=["0"]))
        found.append(run(compiled, inputs))

    thread = threading.Thread(target=calls)
    thread.start()
    thread.join()
    assert_close(found[1], run(model, inputs))
    assert graphs == 1


def _trained() -> Iterator[Any]:
    """A larger network has more of the same layers, seconds for each method: all but one of these in the slow tests."""
    for case in plain_cases(bases.LINEAR, bases.LLAMA):
        quick = case.base is bases.LINEAR or case.method.name.value == "LORA"
        yield pytest.param(case, id=str(case), marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("case", list(_trained()))
def test_compiled_training_steps(case: Case, shared_checkpoint: Any) -> None:
    torch._dynamo.reset()
    folder = shared_checkpoint(case.base, case.config())
    losses = []
    for compiled in (False, True):
        model = splice.PeftModel.from_pretrained(case.base.build(), folder, is_trainable=True)
        called = torch.compile(model, backend="aot_eager") if compiled else model
        losses.append(train(called, case.base.inputs(3), steps=3))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@linear
def test_a_compiled_model_saves_its_adapter(case: Case, shared_checkpoint: Any, tmp_path: Path) -> None:
    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    compiled = torch.compile(model, backend="eager")
    tensors = splice.get_peft_model_state_dict(compiled, unwrap_compiled=True)
    own = splice.get_peft_model_state_dict(model)
    assert set(tensors) == set(own)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in own.items())
    compiled.save_pretrained(tmp_path)
    again = splice.PeftModel.from_pretrained(case.base.build(), tmp_path)
    assert torch.equal(run(again, case.base.inputs(3)), run(model, case.base.inputs(3)))


@pytest.mark.parametrize("case", kind_cases(), ids=str)
def test_a_functional_call(case: Case, shared_checkpoint: Any) -> None:
    """With other values for all parameters: the module's own stay, and the given ones are used."""
    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    network, inputs = model.get_base_model(), case.base.inputs(3)
    before = run(network, inputs)
    parameters = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    assert torch.equal(torch.func.functional_call(network, parameters, (), inputs).detach(), before)
    halved = {name: value * 0.5 for name, value in parameters.items()}
    output = torch.func.functional_call(network, halved, (), inputs).detach()
    assert differ(output, before)
    assert torch.equal(run(network, inputs), before)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    assert torch.equal(run(network, inputs), output)


@linear
def test_gradients_by_functional_transforms(case: Case, shared_checkpoint: Any) -> None:
    """One gradient for each sample, with vmap over grad."""
    if not case.sample.row_by_row:
        pytest.skip("the samples of a batch have no gradients of their own")
    model = splice.PeftModel.from_pretrained(
        case.base.build(), shared_checkpoint(case.base, case.config()), is_trainable=True
    )
    network = model.get_base_model()
    trained = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
    x = case.base.inputs(4)["x"]

    def loss(parameters: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(network, parameters, (sample[None],)).square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    network(x).square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert_close(each[name].sum(0), parameter.grad, factor=10)


@models
def test_moved_to_another_dtype_and_back(case: Case, shared_checkpoint: Any) -> None:
    """`model.to` reaches adapters as it reaches any parameter."""
    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    inputs = case.base.inputs(3)
    before = run(model, inputs)
    model.double()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    assert_close(run(model, doubled).float(), before)
    model.float()
    assert torch.equal(run(model, inputs), before)


@few
def test_hooks_of_the_user_fire_once(case: Case, shared_checkpoint: Any) -> None:
    """On an adapted layer: they see the adapted output, before and after the adapter comes and goes."""
    network = case.base.build()
    path = "first" if hasattr(network, "first") else "model.layers.0.self_attn.q_proj"
    layer, seen = network.get_submodule(path), []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    run(network, case.base.inputs(2))
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(case.base, case.config()))
    run(model, case.base.inputs(2))
    model.unload()
    run(network, case.base.inputs(2))
    assert len(seen) == 3
    assert differ(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_hooks_on_what_holds_tensors_fire_once_and_for_their_own_adapter() -> None:
    config = splice.LoraConfig(target_modules=["first", "second"], r=2)
    model = splice.get_peft_model(bases.LINEAR.build(), config)
    model.add_adapter("second", config)
    fired: list[str] = []
    layer = model.get_base_model().first
    places = {"container": layer.lora_A, "own": layer.lora_A["default"], "other": layer.lora_A["second"]}
    for name, module in places.items():
        module.register_forward_pre_hook(lambda *_, name=name: fired.append(name))
    run(model, bases.LINEAR.inputs(2))
    assert sorted(fired) == ["container", "own"]


# -- accelerate


def _offloaded(network: nn.Module) -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(network, execution_device=torch.device("cpu"))


def _aligned(network: nn.Module) -> nn.Module:
    from accelerate.hooks import attach_align_device_hook

    attach_align_device_hook(network, execution_device=torch.device("cpu"), offload=False)
    return network


def _dispatched(network: nn.Module) -> nn.Module:
    from accelerate import dispatch_model

    return dispatch_model(network, {"": "cpu"}, force_hooks=True)


def _hooked_by_name(network: nn.Module) -> nn.Module:
    """One hook on every module, as a map with one entry for each of them gives."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in network.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return network


def _patched(network: nn.Module) -> nn.Module:
    """A `forward` that someone set on the objects."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.forward = module.forward
    return network


HOOKS = (_offloaded, _aligned, _dispatched, _hooked_by_name, _patched)
hooked = pytest.mark.parametrize("hook", HOOKS, ids=lambda f: f.__name__)
HOOKED = (bases.LINEAR, bases.EMBEDDING, bases.MIXED, bases.LLAMA)
with_hooks = pytest.mark.parametrize("case", plain_cases(*HOOKED), ids=str)


@hooked
@with_hooks
def test_a_base_whose_layers_have_a_forward_of_their_own(
    case: Case, hook: Callable[[nn.Module], nn.Module], shared_checkpoint: Any
) -> None:
    """The adapters take effect above it, and taken off they leave it in place."""
    folder = shared_checkpoint(case.base, case.config(modules_to_save=[case.base.head]))
    second = shared_checkpoint(case.base, case.other_config(), seed=1)
    plain = splice.PeftModel.from_pretrained(case.base.build(), folder)
    plain.load_adapter(second, "second")
    network = hook(case.base.build())
    inputs = case.base.inputs(3)
    output, attributes = run(network, inputs), {n: set(vars(m)) for n, m in network.named_modules()}
    classes = {name: type(module) for name, module in network.named_modules()}
    model = splice.PeftModel.from_pretrained(network, folder)
    model.load_adapter(second, "second")
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        plain.set_adapter(name)
        assert_close(run(model, inputs), run(plain, inputs))
    rows = ["second", "__base__", "default"]
    assert_close(run(model, inputs, adapter_names=rows), run(plain, inputs, adapter_names=rows))
    assert not model.unused_layers()
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), output)
    assert not any(p.is_meta for n, p in model.named_parameters() if "lora" in n)
    model.unload()
    assert torch.equal(run(network, inputs), output)
    assert {n: set(vars(m)) for n, m in network.named_modules()} == attributes
    assert {name: type(module) for name, module in network.named_modules()} == classes


@hooked
@pytest.mark.parametrize("case", plain_cases(bases.LINEAR, bases.LLAMA), ids=str)
def test_hooks_that_come_after_the_adapter(
    case: Case, hook: Callable[[nn.Module], nn.Module], shared_checkpoint: Any
) -> None:
    """As `dispatch_model` is often called on a model that is complete; they may also be removed before it is unloaded."""
    from accelerate.hooks import remove_hook_from_submodules

    plain = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    network = case.base.build()
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(case.base, case.config()))
    inputs = case.base.inputs(3)
    hook(network)
    assert_close(run(model, inputs), run(plain, inputs))
    remove_hook_from_submodules(network)
    assert_close(run(model, inputs), run(plain, inputs))
    assert torch.equal(run(model.unload(), inputs), run(case.base.build(), inputs))


@hooked
@linear
def test_taken_off_below_hooks_that_came_after_the_adapter(
    case: Case, hook: Callable[[nn.Module], nn.Module], shared_checkpoint: Any
) -> None:
    """The hooks stay, and find the base's own forward below them."""
    network = case.base.build()
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(case.base, case.config()))
    hook(network)
    model.unload()
    assert torch.equal(run(network, case.base.inputs(3)), run(case.base.build(), case.base.inputs(3)))


@hooked
@linear
def test_hooks_removed_while_adapted(
    case: Case, hook: Callable[[nn.Module], nn.Module], shared_checkpoint: Any
) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    network = hook(case.base.build())
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(case.base, case.config()))
    inputs = case.base.inputs(3)
    before = run(model, inputs)
    remove_hook_from_submodules(network)
    assert torch.equal(run(model, inputs), before)
    model.unload()
    assert torch.equal(run(network, inputs), run(case.base.build(), inputs))


@hooked
@linear
def test_the_base_layer_below_a_hook(
    case: Case, hook: Callable[[nn.Module], nn.Module], shared_checkpoint: Any
) -> None:
    """The view of the base layer computes what the base does, whatever forward it has."""
    fresh = case.base.build()
    model = splice.PeftModel.from_pretrained(hook(case.base.build()), shared_checkpoint(case.base, case.config()))
    layer, x = model.get_base_model().first, torch.randn(2, 6)
    assert torch.equal(layer.base_layer(x), fresh.first(x))
    assert differ(layer(x), fresh.first(x))


@pytest.mark.parametrize("case", [c for c in plain_cases(bases.LINEAR, bases.LLAMA) if c.sample.merges], ids=str)
def test_merging_offloaded_layers(case: Case, shared_checkpoint: Any) -> None:
    """Their weights are elsewhere between calls: merged right, or refused before anything has changed."""
    plain = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    model = splice.PeftModel.from_pretrained(_offloaded(case.base.build()), shared_checkpoint(case.base, case.config()))
    inputs = case.base.inputs(3)
    refused = ""
    try:
        model.merge_adapter()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        refused = str(error)
    assert not refused or "offload" in refused or "meta" in refused
    assert_close(run(model, inputs), run(plain, inputs), factor=3)


@pytest.mark.parametrize("case", plain_cases(bases.LLAMA), ids=str)
def test_a_base_that_transformers_dispatched(case: Case, shared_checkpoint: Any, tmp_path: Path) -> None:
    """Loaded with a device map, as most people load a model that is large."""
    case.base.build().save_pretrained(tmp_path / "base")
    network = type(case.base.build()).from_pretrained(tmp_path / "base", device_map="cpu").eval()
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(case.base, case.config()))
    plain = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    assert_close(run(model, case.base.inputs(3)), run(plain, case.base.inputs(3)))


# -- several processes


def _two_steps(model: nn.Module, inputs: Inputs) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()


def _half(rank: int, peft_type: str, checkpoint: str, folder: str) -> dict[str, torch.Tensor]:
    """The trained tensors after two steps on this process's rows; the main one saves them into `folder`."""
    case = next(case for case in plain_cases(bases.LINEAR) if case.method.name == peft_type)
    model = splice.PeftModel.from_pretrained(case.base.build(), checkpoint, is_trainable=True)
    model.load_adapter(checkpoint, "other")
    model.train()
    inputs = {name: tensor[rank * 2 : rank * 2 + 2] for name, tensor in case.base.inputs(4).items()}
    _two_steps(nn.parallel.DistributedDataParallel(model), inputs)
    model.save_pretrained(folder, is_main_process=rank == 0)
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


# Two processes for each: here a method whose layers share nothing, and one whose layers do; in the slow tests all of them.
_QUICK = ("LORA", "VERA")
_CASES = [
    pytest.param(case, id=str(case), marks=() if str(case).startswith(_QUICK) else pytest.mark.slow)
    for case in plain_cases(bases.LINEAR)
    if not case.sample.draws_in_training  # each process draws for itself
]


@pytest.mark.parametrize("case", _CASES)
def test_two_processes_train_as_one(case: Case, shared_checkpoint: Any, tmp_path: Path) -> None:
    """Data-parallel on half a batch each: the same weights on both, and those of one process on the whole batch."""
    if not case.sample.row_by_row:
        pytest.skip("half a batch gives something else than its rows in the whole")
    folder = str(shared_checkpoint(case.base, case.config()))
    ranks = on_ranks(_half, case.method.name.value, folder, str(tmp_path / "saved"))
    single = splice.PeftModel.from_pretrained(case.base.build(), folder, is_trainable=True).train()
    _two_steps(single, case.base.inputs(4))
    expected = {name: p.detach() for name, p in named(single) if p.requires_grad}
    assert set(ranks[0]) == set(ranks[1]) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert_close(ranks[0][name], tensor, factor=3)
    saved = splice.PeftModel.from_pretrained(case.base.build(), tmp_path / "saved")
    assert_close(run(saved, case.base.inputs(3)), run(single.eval(), case.base.inputs(3)), factor=3)


# -- a trainer's own checkpoints


@few
def test_a_state_dict_of_the_training_is_resumed(case: Case, shared_checkpoint: Any) -> None:
    folder = shared_checkpoint(case.base, case.config())
    straight = splice.PeftModel.from_pretrained(case.base.build(), folder, is_trainable=True)
    halfway = copy.deepcopy(straight)
    inputs = case.base.inputs(3)
    optimizers = [adamw(straight), adamw(halfway)]

    def step(model: nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()

    for _ in range(4):
        step(straight, optimizers[0])
    for _ in range(2):
        step(halfway, optimizers[1])
    resumed = splice.PeftModel.from_pretrained(case.base.build(), folder, is_trainable=True)
    resumed.load_state_dict(halfway.state_dict())
    optimizer = adamw(resumed)
    optimizer.load_state_dict(optimizers[1].state_dict())
    for _ in range(2):
        step(resumed, optimizer)
    for (name, ours), (_, expected) in zip(resumed.named_parameters(), straight.named_parameters()):
        assert torch.equal(ours, expected), name
    assert parameters_of(resumed) == parameters_of(straight)
    assert isinstance(Pair(case.base, straight, resumed).assert_equal(), torch.Tensor)
    Snapshot.of(case.base.build()).assert_same(resumed.unload(), same_objects=False)
