"""`layer.base_layer = module`: the adapters go around another base layer, or it is refused and nothing has changed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from splice.base.layers import LayerKind
from splice.kinds.registry import all_methods
from tests import bases
from tests.bases import run
from tests.comparing import assert_close, differ
from tests.samples import SAMPLES, Case

METHODS = [
    method
    for method in all_methods().values()
    if LayerKind.LINEAR in method.layers
    and "token_indices" not in method.config.__dataclass_fields__
    and not SAMPLES[method.name].call  # what such a network cannot be called with
]
methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name.value)


class Scaled(nn.Linear):
    """A linear layer of another class, with a buffer."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("factor", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def _model(library: Any, **options: Any) -> Any:
    config = library.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False, **options)
    model = library.get_peft_model(_network(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.linspace(0.1, 0.5, parameter.numel()).reshape(parameter.shape))
    return model


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("new_class", [nn.Linear, Scaled])
def test_the_adapters_go_around_the_new_layer(new_class: type[nn.Linear], bias: str) -> None:
    """As in the reference."""
    torch.manual_seed(1)
    new, outputs = new_class(4, 4), []
    for library in (peft, splice):
        model = _model(library)
        layer = model.base_model.model[0]
        layer.base_layer = copy.deepcopy(new)
        with torch.no_grad():
            outputs.append(model(X))
            with model.disable_adapter():
                outputs.append(model(X))
    assert_close(outputs[2], outputs[0])
    assert_close(outputs[3], outputs[1])
    assert isinstance(layer, new_class)
    assert set(dict(layer.named_parameters())) == {"weight", "bias", "lora_A.default.weight", "lora_B.default.weight"}
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        assert torch.equal(copied(X), outputs[2])
    base = model.unload()[0]
    assert type(base) is new_class
    assert base is layer
    assert torch.equal(base.weight, new.weight)


def test_the_tensors_are_those_of_the_new_layer() -> None:
    model, new = _model(splice), nn.Linear(4, 4)
    layer = model.get_base_model()[0]
    layer.base_layer = new
    assert layer.weight is new.weight
    assert layer.base_layer.weight is new.weight
    assert model.get_base_model()[0] is layer


REFUSED = {
    "no module": (lambda model: torch.ones(4, 4), TypeError, "must be a module, got Tensor"),
    "other sizes": (lambda model: nn.Linear(4, 5), ValueError, "the adapters are for Linear.*out_features=5"),
    "another kind": (lambda model: nn.Embedding(4, 4), ValueError, "the adapters are for Linear.*Embedding"),
    "no layer": (lambda model: nn.ReLU(), ValueError, "the adapters are for Linear.*ReLU"),
    "adapted": (lambda model: _model(splice).get_base_model()[0], ValueError, "carries adapters itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    make, error, message = REFUSED[case]
    model = _model(splice)
    before, layer = run(model, {"input": X}), model.get_base_model()[0]
    with pytest.raises(error, match=message):
        layer.base_layer = make(model)
    assert torch.equal(run(model, {"input": X}), before)
    assert "base_layer" not in layer._modules


def test_refused_while_merged_or_where_a_bias_is_displaced() -> None:
    model = _model(splice)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the old one; unmerge"):
        model.get_base_model()[0].base_layer = nn.Linear(4, 4)
    model = _model(splice, bias="all")
    with pytest.raises(ValueError, match="trains the bias"):
        model.get_base_model()[1].base_layer = nn.Linear(4, 4)


@methods
def test_every_method(method: Any, checkpoint: Any) -> None:
    """A layer with the old one's values in its place changes nothing, and one with others something."""
    case = Case(method, bases.LINEAR)
    model = splice.PeftModel.from_pretrained(case.base.build(), checkpoint(case.base, case.config()))
    inputs = case.base.inputs(2)
    before = run(model, inputs)
    layer: Any = next(layer for layer in model.base_model.adapted.values() if isinstance(layer, nn.Linear))
    new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    values = layer.get_base_layer().state_dict()
    new.load_state_dict(values)
    layer.base_layer = new
    assert torch.equal(run(model, inputs), before)
    with torch.no_grad():
        new.weight.mul_(1.5)
    with model.disable_adapter():
        assert differ(run(model, inputs), run(case.base.build(), inputs))
    with torch.no_grad():
        new.load_state_dict(values)
    assert all(
        torch.equal(tensor, case.base.build().state_dict()[n]) for n, tensor in model.unload().state_dict().items()
    )
