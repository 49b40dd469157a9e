"""Small functions that programs import from the reference's `utils`: the same answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from peft.tuners import tuners_utils
from peft.tuners._buffer_dict import BufferDict as ReferenceBufferDict
from peft.utils import other, save_and_load
from torch import nn

import splice
from splice import utilities
from splice.buffer_dict import BufferDict
from tests import bases

NAMES = {
    "_freeze_adapter": "freeze_adapter",
    "_get_batch_size": "get_batch_size",
    "_get_input_embeddings_name": "get_input_embeddings_name",
    "_get_submodules": "get_submodules",
    "_is_valid_match": "is_valid_match",
    "_set_adapter": "set_auxiliary_adapter",
}
Outcome = tuple[Any, str]


def outcome(function: Callable[..., Any], *arguments: Any) -> Outcome:
    """What it gives, or the class of what it raises."""
    try:
        return function(*arguments), ""
    except Exception as error:
        return None, type(error).__name__


def same(name: str, *arguments: Any) -> Any:
    """Both give the same, or raise the same; what it is."""
    theirs = next(vars(module)[name] for module in (other, tuners_utils, save_and_load) if name in vars(module))
    ours = vars(utilities)[NAMES.get(name, name)]
    (found, raised), (wanted, wanted_raised) = outcome(ours, *arguments), outcome(theirs, *arguments)
    assert raised == wanted_raised
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted)
    else:
        assert found == wanted
    return found


IDS = torch.tensor([[5, -100, 7], [1, 2, 3]])
NETWORK = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2))
CALLS: list[tuple[Any, ...]] = [
    ("transpose", torch.arange(6.0).reshape(2, 3), True),
    ("transpose", nn.Parameter(torch.arange(6.0).reshape(2, 3)), True),
    ("transpose", torch.arange(6.0), False),
    ("shift_tokens_right", IDS, 0, 9),
    ("shift_tokens_right", IDS, None, 9),
    ("_get_batch_size", IDS, None),
    ("_get_batch_size", None, torch.zeros(4, 2, 2)),
    ("_get_batch_size", None, None),
    *(("_is_valid_match", *pair) for pair in [("a.q", "q"), ("q", "q"), ("aq", "q"), ("a.b.q", "b.q"), ("a.q.c", "q")]),
    ("_get_submodules", NETWORK, "0.1"),
    ("_get_submodules", NETWORK, "1"),
    ("_get_submodules", NETWORK, "0.7"),
    *(("get_pattern_key", ["q", "x.v"], key) for key in ("a.v", "a.x.v", "q", "z")),
    *(("str_to_bool", word) for word in ("yes", "0", "TRUE", "off", "maybe", "")),
    ("find_parameter_name_by_module", NETWORK, NETWORK[0][1]),
    ("find_parameter_name_by_module", NETWORK, nn.ReLU()),
    ("id_tensor_storage", torch.zeros(3, 4)[1:]),
    ("infer_device",),
    ("get_quantization_config", NETWORK, "gptq"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: str(call[0]))
def test_the_same_answers(call: tuple[Any, ...]) -> None:
    same(*call)


def test_names_of_embeddings() -> None:
    assert same("_get_input_embeddings_name", bases.LLAMA.build()) == "model.embed_tokens"
    assert same("_get_input_embeddings_name", NETWORK) is None
    assert same("_get_input_embeddings_name", NETWORK, "mine") == "mine"


@pytest.mark.parametrize("key", ["q", "a.q", "b.q", "bq", "a.layers.1.q", "a.layers.2.q"])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q"], "exclude_modules": ["a.q"]},
        {"target_modules": ".*q"},
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q"], "modules_to_save": ["layers"]},
    ],
)
def test_whether_a_config_selects_a_module(fields: dict[str, Any], key: str) -> None:
    theirs = tuners_utils.check_target_module_exists(peft.LoraConfig(**fields), key)
    assert utilities.check_target_module_exists(splice.LoraConfig(**fields), key) is bool(theirs)


@pytest.fixture(params=["ours", "theirs"])
def library(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """A library, and its small functions under our names."""
    if request.param == "ours":
        yield splice, utilities
    else:
        functions = {**vars(save_and_load), **vars(tuners_utils), **vars(other)}
        yield peft, type("Functions", (), {ours: staticmethod(functions[n]) for n, ours in NAMES.items()} | functions)


def tuned(library: Any, **fields: Any) -> Any:
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    return library.get_peft_model(network, library.LoraConfig(target_modules=["0"], modules_to_save=["2"], **fields))


def test_parameters_for_mixed_precision(library: tuple[Any, Any]) -> None:
    model = tuned(library[0])
    library[1].cast_mixed_precision_params(model, torch.bfloat16)
    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_freezing_an_adapter(library: tuple[Any, Any]) -> None:
    model = tuned(library[0])
    library[1].freeze_adapter(model, "default")
    assert not [name for name, p in model.named_parameters() if p.requires_grad]


def test_adapters_that_are_left_to_merge(library: tuple[Any, Any]) -> None:
    model = tuned(library[0])
    layer, left = model.base_model.model[0], library[1].check_adapters_to_merge
    assert left(layer) == ["default"]
    with pytest.raises(TypeError, match="adapter_names should be a list of strings"):
        left(layer, "default")
    model.add_adapter("other", library[0].LoraConfig(target_modules=["0"]))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        assert left(layer) == []
    with pytest.warns(UserWarning, match="Already following adapters were merged.*additionally merging.*other"):
        assert left(layer, ["default", "other"]) == ["other"]


def test_modules_that_a_config_matched(library: tuple[Any, Any]) -> None:
    found = library[1].inspect_matched_modules(tuned(library[0]).base_model)
    assert found["matched"] == ["0"]
    assert {"1", "2"} <= set(found["unmatched"])


def test_activating_what_is_kept_whole(library: tuple[Any, Any]) -> None:
    model = tuned(library[0])
    model.add_adapter("other", library[0].LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    network = model.base_model.model
    library[1].set_auxiliary_adapter(model, "other")
    assert (network[0].active_adapters, network[2].active_adapters) == (["default"], ["other"])


def test_where_the_weight_of_embeddings_stands() -> None:
    config = splice.LoraConfig(target_modules=["embed_tokens", "q_proj"])
    model = splice.get_peft_model(bases.LLAMA.build(), config)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    name = utilities.get_embedding_layer_name(model, embeddings, True)
    assert f"{name}.weight" in model.state_dict()
    assert utilities.get_embedding_layer_name(model, embeddings, False) == name
    assert utilities.get_embedding_layer_name(model, head, True) is None
    assert utilities.get_embedding_layer_name(model, head, False) == "base_model.model.lm_head"


def test_weights_of_an_offloaded_layer_are_there_inside() -> None:
    from accelerate import cpu_offload

    layer = nn.Linear(3, 2)
    expected = layer.weight.detach().clone()
    cpu_offload(layer, torch.device("cpu"), offload_buffers=True)
    assert layer.weight.device.type == "meta"
    with utilities.onload_layer(layer):
        assert torch.equal(layer.weight, expected)
        assert torch.equal(utilities.dequantize_module_weight(layer), expected)
    assert layer.weight.device.type == "meta"


def test_a_dict_of_buffers() -> None:
    for make in (BufferDict, ReferenceBufferDict):
        held = make({"a": torch.zeros(2), "b": torch.ones(3)}, persistent=True)
        assert list(held) == list(held.keys()) == ["a", "b"]
        assert list(held.state_dict()) == ["a", "b"]
        held["c"] = torch.zeros(1)
        assert held.pop("a").shape == (2,)
        assert len(held) == 2
        assert "a" not in held
        assert [tuple(v.shape) for v in held.values()] == [(3,), (1,)]
        assert list(make({"a": torch.zeros(2)}).state_dict()) == []
        held.clear()
        assert not list(held.items())


@pytest.mark.parametrize("name", ["LoRA", "lora_", "nosuch", "lora"])
def test_a_method_written_for_the_reference_is_refused(name: str) -> None:
    register = peft.utils.peft_types.register_peft_method
    wanted = outcome(lambda: register(name=name, config_cls=peft.LoraConfig, model_cls=peft.LoraModel))
    found = outcome(lambda: utilities.register_peft_method(name=name, config_cls=peft.LoraConfig, model_cls=nn.Module))
    assert found == wanted != (None, "")


def test_a_method_that_is_not_built_cannot_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilities, "all_methods", dict)
    with pytest.raises(splice.UnsupportedFeatureError, match=r"CONTRIBUTING\.md"):
        utilities.register_peft_method(name="shadow", config_cls=peft.ShadowConfig, model_cls=peft.ShadowModel)
