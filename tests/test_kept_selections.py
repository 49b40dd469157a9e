"""A call keeps the selection that it began with, whatever other threads select meanwhile, and so does its backward."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

import splice


class Net(nn.Module):
    """Three layers, and something that is called between the first and the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.between: Callable[[], None] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        self.between()
        return self.third(self.second(x))


def _model(**options: Any) -> Any:
    """With adapters "default", which is active, and "second"."""
    torch.manual_seed(0)
    config = splice.LoraConfig(target_modules=["first", "second", "third"], r=2, init_lora_weights=False, **options)
    model = splice.get_peft_model(Net(), config)
    other = splice.LoraConfig(target_modules=["first", "second", "third"], r=2, init_lora_weights=False)
    model.add_adapter("second", other)
    return model.eval()


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def _output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(X)


def _by_another_thread(work: Callable[[], Any]) -> list[Any]:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join(20)
    return result


def _outputs(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("second", "default"):
        model.set_adapter(name)
        found[name] = _output(model)
    with model.disable_adapter():
        found["base"] = _output(model)
    return found


CHANGES: dict[str, Callable[[Any], None]] = {
    "second": lambda model: model.set_adapter("second"),
    "base": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("after", CHANGES)
def test_another_thread_selects_in_the_middle_of_a_call(after: str) -> None:
    """The call is the old one's from beginning to end; calls that begin then, in that thread and the next here, are new."""
    model = _model()
    expected = _outputs(model)
    meanwhile: list[Any] = []

    def change() -> torch.Tensor:
        network.between = lambda: None
        CHANGES[after](model)
        return _output(model)

    network = model.get_base_model()
    network.between = lambda: meanwhile.extend(_by_another_thread(change))
    assert torch.equal(_output(model), expected["default"])
    assert torch.equal(meanwhile[0], expected[after])
    assert torch.equal(_output(model), expected[after])
    assert model.base_model.selection._own_choices == 0


def test_selected_twice_meanwhile_and_then_inside_the_call() -> None:
    model = _model()
    expected, network = _outputs(model), model.get_base_model()

    def twice() -> None:
        network.between = lambda: None
        for name in ("second", "default", "second"):
            _by_another_thread(lambda name=name: model.set_adapter(name))

    network.between = twice
    assert torch.equal(_output(model), expected["default"])
    # What a call selects itself takes effect at once, as ever.
    network.between = lambda: model.set_adapter("default")
    mixed = _output(model)
    assert not torch.equal(mixed, expected["default"])
    assert not torch.equal(mixed, expected["second"])
    network.between = lambda: None
    assert torch.equal(_output(model), expected["default"])
    assert model.base_model.selection._own_choices == 0


def test_many_threads() -> None:
    """Some switch without end, others call: every output is that of one adapter."""
    model = _model()
    expected = [*_outputs(model).values()][:2]
    done, wrong = threading.Event(), []

    def switch() -> None:
        while not done.is_set():
            for name in ("second", "default"):
                model.base_model.selection.set([name])

    def call() -> None:
        for _ in range(150):
            output = _output(model)
            if not any(torch.equal(output, one) for one in expected):
                wrong.append(output)

    switching = threading.Thread(target=switch)
    switching.start()
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    switching.join()
    assert wrong == []
    assert model.base_model.selection._own_choices == 0


def test_an_exception_and_copies_leave_nothing_kept() -> None:
    model = _model()
    network = model.get_base_model()
    copies: list[Any] = []

    def fail() -> None:
        _by_another_thread(lambda: model.set_adapter("second"))
        network.between = None
        copies.extend([copy.deepcopy(model), pickle.loads(pickle.dumps(model))])
        raise RuntimeError("in the middle")

    network.between = fail
    with pytest.raises(RuntimeError, match="in the middle"):
        model(X)
    assert model.base_model.selection._own_choices == 0
    for each in (model, *copies):
        assert each.base_model.selection._own_choices == 0
        each.get_base_model().between = int
        assert torch.equal(_output(each), _outputs(_model())["second"])


def test_another_thread_reads_the_bases_bias_while_one_is_shown() -> None:
    """Of a trained bias that one thread's call computes with, others see nothing."""
    model = _model(bias="lora_only")
    layer = model.get_base_model().first
    with torch.no_grad():
        model.get_base_model().first.base_layer.bias.add_(1)
    own, seen = layer._parameters["bias"], []
    original = torch.nn.functional.linear

    def linear(*args: Any) -> torch.Tensor:
        seen.extend((bias, *_by_another_thread(lambda: layer.bias)) for bias in args[2:] if bias is not None)
        return original(*args)

    torch.nn.functional.linear, before = linear, torch.nn.functional.linear
    try:
        _output(model)
    finally:
        torch.nn.functional.linear = before
    assert torch.equal(seen[0][0], own + 1)
    assert seen[0][1] is own


# -- backward


class Blocks(Net):
    """Each layer is recomputed in the backward."""

    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second, self.third):
            block = nn.Sequential(layer, nn.Tanh())
            x = recomputed(block, x, use_reentrant=self.reentrant)
        return x


def _trained(reentrant: bool, recompute: bool, after: Callable[[Any], None]) -> dict[str, torch.Tensor | None]:
    model = _model()
    network = model.get_base_model()
    network.__class__, Blocks.reentrant = Blocks, reentrant
    if not recompute:
        network.forward = lambda x: torch.tanh(network.third(torch.tanh(network.second(torch.tanh(network.first(x))))))
    for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
        parameter.requires_grad_(True)
    loss = model(X.clone().requires_grad_(True)).square().sum()
    after(model)
    for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
        parameter.requires_grad_(True)
    loss.backward()
    assert model.base_model.selection._own_choices == 0
    return {name: p.grad for name, p in model.named_parameters() if "default" in name}


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("after", CHANGES)
def test_what_a_backward_recomputes_is_what_was_computed(after: str, reentrant: bool) -> None:
    expected = _trained(reentrant, False, lambda model: None)
    found = _trained(reentrant, True, CHANGES[after])
    assert all(grad is not None and grad.any() for grad in expected.values())
    for name, grad in expected.items():
        assert found[name] is not None, name
        assert torch.allclose(found[name], grad, atol=1e-6), name


def test_two_adapters_in_one_backward() -> None:
    def both(network_class: type[nn.Module]) -> list[torch.Tensor]:
        model = _model()
        model.get_base_model().__class__ = network_class
        losses = []
        for name in ("default", "second"):
            model.set_adapter(name)
            losses.append(model(X.clone().requires_grad_(True)).tanh().square().sum())
        for name in ("default", "second"):
            model.base_model.set_requires_grad(name)
        (losses[0] + losses[1]).backward()
        return [p.grad for n, p in model.named_parameters() if "lora_" in n]

    class Whole(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in (self.first, self.second, self.third):
                x = torch.tanh(layer(x))
            return x

    Blocks.reentrant = False
    for ours, expected in zip(both(Blocks), both(Whole)):
        assert torch.allclose(ours, expected, atol=1e-6)


class _Watched(torch.autograd.Function):
    """Does `run`, which a test sets, in the middle of a backward."""

    run: Callable[[], None]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        _Watched.run()
        return grad


def _backward() -> None:
    _Watched.apply(torch.ones(1, requires_grad=True)).sum().backward()


def test_what_a_failed_backward_kept_is_forgotten_with_the_next_call() -> None:
    """Nobody is told of its end; while anything is kept, every call looks for what is its own."""
    model = _model()
    selection = model.base_model.selection
    choice = selection.choice
    model.set_adapter("second")

    def fail() -> None:
        selection.keep_for_backward(choice)
        assert selection.current() == choice
        raise RuntimeError("in the backward")

    _Watched.run = fail
    with pytest.raises(RuntimeError, match="in the backward"):
        _backward()
    _output(model)
    assert selection._own_choices == 0 and not selection._kept.backwards


def test_a_call_leaves_what_the_backward_of_another_thread_keeps() -> None:
    model = _model()
    selection = model.base_model.selection
    choice = selection.choice
    model.set_adapter("second")
    kept, called, found = threading.Event(), threading.Event(), []

    def wait() -> None:
        selection.keep_for_backward(choice)
        kept.set()
        called.wait(20)
        found.append(selection.current())

    _Watched.run = wait
    thread = threading.Thread(target=_backward)
    thread.start()
    assert kept.wait(20)
    assert torch.equal(_output(model), _outputs(_model())["second"])
    called.set()
    thread.join(20)
    assert found == [choice]
    assert selection._own_choices == 0
