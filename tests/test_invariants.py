"""What always holds: adapters come and go, and the base model is what it was."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from splice.surgery.adapted_layer import Adapted
from tests import bases
from tests.bases import run
from tests.comparing import (
    Snapshot,
    assert_close,
    assert_same_tensors,
    base_parameters,
    differ,
    parameters_of,
    tensors_in,
)
from tests.counting import calls_of
from tests.samples import Case, kind_cases, network_cases, plain_cases

ALL_KINDS = [*kind_cases(), *plain_cases(*bases.SPECIAL, bases.MIXED, *bases.TRANSFORMERS, bases.TIED)]
every = pytest.mark.parametrize("case", ALL_KINDS, ids=str)
few = pytest.mark.parametrize("case", plain_cases(bases.LINEAR, bases.EMBEDDING, bases.MIXED, bases.LLAMA), ids=str)


def loaded(case: Case, shared_checkpoint: Any, network: Any = None, **options: Any) -> Any:
    folder = shared_checkpoint(case.base, case.config(modules_to_save=[case.base.head]))
    return splice.PeftModel.from_pretrained(network or case.base.build(), folder, **options)


def load_second(model: Any, case: Case, shared_checkpoint: Any, name: str = "second", **options: Any) -> Any:
    return model.load_adapter(shared_checkpoint(case.base, case.other_config(), seed=1), name, **options)


# -- attach, then detach


def _delete_all(model: Any) -> Any:
    for name in list(model.peft_config):
        model.delete_adapter(name)
    return model.get_base_model()


def _unload(model: Any) -> Any:
    return model.unload()


@pytest.mark.parametrize("take_off", [_delete_all, _unload], ids=lambda f: f.__name__)
@every
def test_taken_off_the_base_is_what_it_was(case: Case, take_off: Callable[..., Any], shared_checkpoint: Any) -> None:
    network = case.base.build()
    network.get_submodule(case.base.head).requires_grad_(False)  # flags are given back, not just set
    before, output = Snapshot.of(network), run(network, case.base.inputs(3))
    model = loaded(case, shared_checkpoint, network)
    load_second(model, case, shared_checkpoint)
    run(model, case.base.inputs(3))
    model.set_adapter("second")
    assert take_off(model) is network
    before.assert_same(network)
    assert torch.equal(run(network, case.base.inputs(3)), output)


def test_a_class_that_was_put_in_front_since_stays_in_front(shared_checkpoint: Any) -> None:
    """As FSDP puts one there; with the last adapter only what stands behind it goes."""

    class Divided:
        def mark(self) -> str:
            return self.said

    network = bases.LINEAR.build()
    before = run(network, bases.LINEAR.inputs(3))
    model = loaded(plain_cases(bases.LINEAR)[0], shared_checkpoint, network)
    layers = [m for m in network.modules() if isinstance(m, Adapted)]
    own = [layer.splice_host.original for layer in layers]
    for layer in layers:
        layer.__class__ = type(f"Divided{type(layer).__name__}", (Divided, type(layer)), {"said": "kept"})
    model.unload()
    assert model.base_model.targeted_module_names == [] and model.unused_layers() == []
    assert torch.equal(run(network, bases.LINEAR.inputs(3)), before)
    for layer, original in zip(layers, own, strict=True):
        assert type(layer).__bases__ == (Divided, original) and type(layer).__name__ == f"Divided{original.__name__}"
        assert layer.mark() == "kept" and not isinstance(layer, Adapted)


@few
def test_a_new_adapter_taken_off(case: Case) -> None:
    network = case.base.build()
    before = Snapshot.of(network)
    model = splice.get_peft_model(network, splice.get_peft_config(case.config(modules_to_save=[case.base.head])))
    run(model, case.base.inputs(3))
    model.unload()
    before.assert_same(network)


@every
def test_merged_and_unmerged_then_taken_off(case: Case, shared_checkpoint: Any) -> None:
    network = case.base.build()
    before = Snapshot.of(network)
    model = loaded(case, shared_checkpoint, network)
    if not all(adapter.mergeable for adapter in model.base_model.placed["default"].values()):
        pytest.skip("cannot be merged")
    model.merge_adapter()
    model.unload()  # unmerges
    before.assert_same(network)


@few
def test_again_and_again(case: Case, shared_checkpoint: Any) -> None:
    network = case.base.build()
    before = Snapshot.of(network)
    outputs = []
    for _ in range(4):
        model = loaded(case, shared_checkpoint, network)
        load_second(model, case, shared_checkpoint)
        outputs.append(run(model, case.base.inputs(3)))
        model.unload()
        before.assert_same(network)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@few
def test_adapters_come_and_go_while_others_stay(case: Case, shared_checkpoint: Any) -> None:
    network = case.base.build()
    before = Snapshot.of(network)
    model = loaded(case, shared_checkpoint, network)
    output, names = run(model, case.base.inputs(3)), parameters_of(model)
    for _ in range(3):
        load_second(model, case, shared_checkpoint)
        model.delete_adapter("second")
        assert parameters_of(model) == names
        assert torch.equal(run(model, case.base.inputs(3)), output)
    model.delete_adapter("default")
    before.assert_same(network)


@every
def test_a_deep_copy_is_independent(case: Case, shared_checkpoint: Any) -> None:
    network = case.base.build()
    before, inputs = Snapshot.of(network), case.base.inputs(3)
    model = loaded(case, shared_checkpoint, network)
    load_second(model, case, shared_checkpoint)
    output = run(model, inputs)
    clone = copy.deepcopy(model)
    assert torch.equal(run(clone, inputs), output)
    assert parameters_of(clone) == parameters_of(model)
    clone.set_adapter("second")
    assert differ(run(clone, inputs), output)
    assert torch.equal(run(model, inputs), output)
    assert model.active_adapters == ["default"]
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert torch.equal(run(model, inputs), output)
    model.unload()
    before.assert_same(network)
    assert clone.active_adapters == ["second"]


@every
def test_a_deep_copy_taken_off(case: Case, shared_checkpoint: Any) -> None:
    network = case.base.build()
    before = Snapshot.of(network)
    clone = copy.deepcopy(loaded(case, shared_checkpoint, network))
    before.assert_same(clone.unload(), same_objects=False)


@few
def test_a_deep_copy_of_the_bare_network(case: Case, shared_checkpoint: Any) -> None:
    """Of the network that the user holds, not of the PeftModel: it carries the adapter, and can be unloaded."""
    network = case.base.build()
    before, inputs = Snapshot.of(network), case.base.inputs(3)
    model = loaded(case, shared_checkpoint, network)
    clone = copy.deepcopy(network)
    assert torch.equal(run(clone, inputs), run(model, inputs))
    model.unload()
    before.assert_same(network)
    assert differ(run(clone, inputs), run(network, inputs))


@pytest.mark.parametrize("through", ["torch", "pickle"])
@every
def test_through_pickle(case: Case, through: str, shared_checkpoint: Any) -> None:
    network = case.base.build()
    before, inputs = Snapshot.of(network), case.base.inputs(3)
    model = loaded(case, shared_checkpoint, network)
    load_second(model, case, shared_checkpoint)
    output = run(model, inputs)
    again = _through_torch(model) if through == "torch" else pickle.loads(pickle.dumps(model))
    assert torch.equal(run(again, inputs), output)
    assert parameters_of(again) == parameters_of(model)
    assert again.active_adapters == model.active_adapters
    again.set_adapter("second")
    assert differ(run(again, inputs), output)
    assert torch.equal(run(model, inputs), output)
    before.assert_same(again.unload(), same_objects=False)


def _through_torch(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# -- loading changes nothing of the base


@every
def test_the_base_keeps_names_objects_and_values(case: Case, shared_checkpoint: Any) -> None:
    network = case.base.build()
    names = {name: id(parameter) for name, parameter in network.named_parameters()}
    values = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    types = {path: type(module) for path, module in network.named_modules()}
    model = loaded(case, shared_checkpoint, network)
    load_second(model, case, shared_checkpoint)
    now = dict(network.named_parameters())
    assert {name: id(now[name]) for name in names} == names
    assert not any(now[name].requires_grad for name in names)
    for name, value in values.items():
        assert torch.equal(network.state_dict()[name], value), name
    for path, cls in types.items():
        assert isinstance(network.get_submodule(path), cls)
    assert list(base_parameters(network)) == list(names)


@few
def test_a_load_leaves_the_flags_of_others_alone(case: Case, shared_checkpoint: Any) -> None:
    """Of other adapters, and of base parameters that the user unfroze since."""
    model = loaded(case, shared_checkpoint, is_trainable=True)
    frozen = next(iter(model.base_model.placed["default"].values()))
    frozen.set_trained(False)
    unfrozen = next(model.get_base_model().parameters())
    unfrozen.requires_grad = True
    flags = {name: described.requires_grad for name, described in parameters_of(model).items()}
    for name, trainable in (("second", False), ("third", not case.sample.one_trained)):
        load_second(model, case, shared_checkpoint, name, is_trainable=trainable)
        now = {name: described.requires_grad for name, described in parameters_of(model).items()}
        assert {key: now[key] for key in flags if key in now} == {key: flags[key] for key in flags if key in now}
    assert unfrozen.requires_grad


@few
def test_loaded_tensors_are_their_own(case: Case, checkpoint: Any) -> None:
    """The files may be overwritten and deleted afterwards."""
    folder = checkpoint(case.base, case.config())
    model = splice.PeftModel.from_pretrained(case.base.build(), folder)
    output = run(model, case.base.inputs(3))
    for file in folder.iterdir():
        with open(file, "r+b") as opened:
            opened.write(b"\0" * file.stat().st_size)
        file.unlink()
    assert torch.equal(run(model, case.base.inputs(3)), output)


def test_the_flags_of_the_base_come_back_when_the_last_adapter_leaves(shared_checkpoint: Any) -> None:
    case = plain_cases(bases.LINEAR)[0]
    network = case.base.build()
    network.first.weight.requires_grad = False
    flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    model = loaded(case, shared_checkpoint, network)
    load_second(model, case, shared_checkpoint)
    model.delete_adapter("default")
    assert not any(parameter.requires_grad for parameter in base_parameters(network).values())
    model.delete_adapter("second")
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == flags


def test_a_model_without_adapters_is_the_base_and_takes_a_new_one(shared_checkpoint: Any) -> None:
    case = plain_cases(bases.LINEAR)[0]
    model = loaded(case, shared_checkpoint)
    output = run(model, case.base.inputs(3))
    model.delete_adapter("default")
    assert torch.equal(run(model, case.base.inputs(3)), run(case.base.build(), case.base.inputs(3)))
    folder = shared_checkpoint(case.base, case.config(modules_to_save=[case.base.head]))
    model.load_adapter(folder, "again")
    model.set_adapter("again")
    assert torch.equal(run(model, case.base.inputs(3)), output)


# -- what adapters cost each other


@pytest.mark.parametrize("case", plain_cases(bases.MIXED, bases.LLAMA), ids=str)
def test_the_cost_of_everything_is_the_same_for_the_second_adapter_and_the_thirtieth(
    case: Case, shared_checkpoint: Any, tmp_path: Path
) -> None:
    model = loaded(case, shared_checkpoint)
    folder = shared_checkpoint(case.base, case.other_config(), seed=1)
    inputs = case.base.inputs(2)

    def costs(name: str) -> dict[str, int]:
        return {
            "load": calls_of(lambda: model.load_adapter(folder, name)),
            "load again": calls_of(lambda: model.load_adapter(folder, name)),
            "activate": calls_of(lambda: model.set_adapter(name)),
            "activate frozen": calls_of(lambda: model.set_adapter("default", inference_mode=True)),
            "eval mode": calls_of(model.eval),
            "forward": calls_of(lambda: run(model, inputs)),
            "rows": calls_of(lambda: run(model, inputs, adapter_names=[name, "__base__"])),
            "save": calls_of(lambda: model.save_pretrained(tmp_path, selected_adapters=[name])),
            "merge": calls_of(lambda: (model.set_adapter(name), merge())),
        }

    def merge() -> None:
        if case.sample.merges:
            model.merge_adapter()
            model.unmerge_adapter()

    for warm_up in range(2):
        costs(f"warm up {warm_up}")
    few_adapters = costs("adapter 2")
    for number in range(3, 30):
        model.load_adapter(folder, f"adapter {number}")
    many_adapters = costs("adapter 30")
    grown = {what: (few_adapters[what], n) for what, n in many_adapters.items() if n > few_adapters[what] * 1.05 + 20}
    assert not grown


def test_deleting_costs_the_same_among_many(shared_checkpoint: Any) -> None:
    case = plain_cases(bases.LLAMA)[0]
    model = loaded(case, shared_checkpoint)
    folder = shared_checkpoint(case.base, case.other_config(), seed=1)
    model.load_adapter(folder, "a")
    few_adapters = calls_of(lambda: model.delete_adapter("a"))
    for number in range(30):
        model.load_adapter(folder, str(number))
    assert calls_of(lambda: model.delete_adapter("7")) <= few_adapters * 1.05 + 20


# -- what callers pass in stays theirs


@few
def test_a_config_passed_in_is_not_changed(case: Case, shared_checkpoint: Any) -> None:
    folder = shared_checkpoint(case.base, case.config())
    config = splice.PeftConfig.from_pretrained(folder)
    before = copy.deepcopy(vars(config))
    for is_trainable in (True, False):
        model = splice.PeftModel.from_pretrained(
            case.base.build(), folder, config=config, is_trainable=is_trainable, ephemeral_gpu_offload=True
        )
        assert vars(config) == before
        assert model.peft_config["default"] is not config
        assert model.peft_config["default"].inference_mode is not is_trainable
    model.peft_config["default"].target_modules.clear()
    assert vars(config) == before


@pytest.mark.parametrize("case", plain_cases(bases.LLAMA), ids=str)
def test_a_config_that_leaves_targets_open_is_not_changed(case: Case, checkpoint: Any) -> None:
    """Where the reference writes "all-linear" or default targets back into the config it was given."""
    folder = checkpoint(case.base, case.config(target_modules="all-linear"))
    config = dataclasses.replace(splice.PeftConfig.from_pretrained(folder), target_modules="all-linear")
    splice.PeftModel.from_pretrained(case.base.build(), folder, config=config)
    assert config.target_modules == "all-linear"


def test_options_passed_in_are_not_changed(shared_checkpoint: Any) -> None:
    case = plain_cases(bases.LINEAR)[0]
    folder = shared_checkpoint(case.base, case.config())
    mapping, options = {"^first": "first"}, {"revision": None, "subfolder": None}
    model = splice.PeftModel.from_pretrained(case.base.build(), folder, key_mapping=mapping, **options)
    names = ["default", "__base__", "default"]
    run(model, case.base.inputs(3), adapter_names=names)
    adapters = ["default", "default"]
    model.base_model.set_adapter(adapters[:1])
    assert mapping == {"^first": "first"}
    assert options == {"revision": None, "subfolder": None}
    assert names == ["default", "__base__", "default"]


@few
def test_a_dict_of_tensors_is_not_changed_and_not_shared(case: Case, shared_checkpoint: Any) -> None:
    tensors = tensors_in(shared_checkpoint(case.base, case.config()))
    before = copy.deepcopy(tensors)
    model = splice.get_peft_model(case.base.build(), splice.get_peft_config(case.config()))
    splice.set_peft_model_state_dict(model, tensors)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_same_tensors(tensors, before)


# -- any string is a name

NAMES = (
    "a.b", "lora", "lora_A", "lora_A.weight", "model", "base_model", "weight", "bias", "keys", "values", "pop", "training",
    "default.weight", "default", "first", "head", "adapters", "base_layer", "modules_to_save", "forward", "_modules",
    "ünïcödé ✓", "0", "with space", "{x}", "a%b", "None", "self",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_string_is_an_adapter_name(name: str, shared_checkpoint: Any, tmp_path: Path) -> None:
    for case in kind_cases()[:1]:
        inputs = case.base.inputs(3)
        first = shared_checkpoint(case.base, case.config(modules_to_save=[case.base.head]))
        expected = run(peft.PeftModel.from_pretrained(case.base.build(), str(first)), inputs)
        network = case.base.build()
        before = Snapshot.of(network)
        model = splice.PeftModel.from_pretrained(network, first, adapter_name=name)
        load_second(model, case, shared_checkpoint, "other")
        assert_close(run(model, inputs), expected)
        assert_close(run(model, inputs, adapter_names=[name] * 3), expected)
        assert len(dict(model.named_parameters())) == len(list(model.parameters())) == len(model.state_dict())
        model.set_adapter("other")
        model.set_adapter(name)
        model.load_adapter(first, name)
        model.load_state_dict(model.state_dict())
        model.save_pretrained(tmp_path)
        saved = tmp_path if name == "default" else tmp_path / name
        assert_same_tensors(tensors_in(saved), tensors_in(first))
        assert_close(run(splice.PeftModel.from_pretrained(case.base.build(), saved), inputs), expected)
        assert_close(run(copy.deepcopy(model), inputs), expected)
        model.delete_adapter("other")
        assert_close(run(model, inputs), expected)
        model.delete_adapter(name)
        before.assert_same(network)


def test_an_empty_name_is_refused(shared_checkpoint: Any) -> None:
    case = plain_cases(bases.LINEAR)[0]
    with pytest.raises(ValueError, match="adapter_name must be a non-empty string"):
        loaded(case, shared_checkpoint, adapter_name="")


def test_the_name_of_no_adapter_is_refused(shared_checkpoint: Any) -> None:
    """`__base__` means "no adapter" in a mixed batch, so an adapter of that name could never be chosen there."""
    case = plain_cases(bases.LINEAR)[0]
    with pytest.raises(ValueError, match="__base__"):
        loaded(case, shared_checkpoint, adapter_name="__base__")


@pytest.mark.parametrize(
    "names", [("fir", "first"), ("a", "a.a"), ("default", "default.1"), ("x", "lora_A.x")], ids=str
)
def test_names_that_contain_each_other(names: tuple[str, str], shared_checkpoint: Any, tmp_path: Path) -> None:
    """Each is saved, frozen, thawed and deleted without the other."""
    case = plain_cases(bases.LINEAR)[0]
    first = shared_checkpoint(case.base, case.config())
    second = shared_checkpoint(case.base, case.config(), seed=1)
    inputs = case.base.inputs(3)
    for one, other in (names, names[::-1]):
        model = splice.PeftModel.from_pretrained(case.base.build(), first, adapter_name=one)
        model.load_adapter(second, other)
        outputs = {}
        for name in names:
            model.set_adapter(name)
            outputs[name] = run(model, inputs)
            trainable = {id(p) for p in model.parameters() if p.requires_grad}
            own = model.base_model.placed[name].values()
            assert trainable == {id(tensor) for layer in own for _, tensor in layer.named_slots()}
        model.save_pretrained(tmp_path)
        for name, folder in ((one, first), (other, second)):
            saved = tmp_path if name == "default" else tmp_path / name
            assert_same_tensors(tensors_in(saved), tensors_in(folder))
        model.delete_adapter(one)
        assert list(model.peft_config) == [other]
        assert torch.equal(run(model, inputs), outputs[other])


# -- a base layer's own members come first


class Crowded(nn.Module):
    """A module whose own members are called like what an adapted layer offers."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.Linear(4, 4)
        self.base_layer = nn.Linear(4, 3)
        self.scaling = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("r", torch.tensor(3.0))

    @property
    def merged(self) -> str:
        return "my own"

    def set_scale(self) -> str:
        return "my own as well"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(self.adapters(x)) * self.scaling + self.r


class CrowdedLinear(nn.Linear):
    """A linear layer that scales its output by a buffer of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("scaling", torch.tensor(0.5))
        self.lora_alpha = nn.Parameter(torch.ones(sizes[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scaling + self.lora_alpha


def _crowded() -> nn.Module:
    torch.manual_seed(0)
    net = bases.Net(CrowdedLinear(6, 8), nn.Linear(8, 4), 4).eval()
    net.head = Crowded().eval()
    return net


@pytest.mark.parametrize("whole", [["head"], None], ids=["head saved whole", "targets only"])
def test_members_of_the_base_with_the_names_of_views(whole: list[str] | None, checkpoint: Any) -> None:
    case = plain_cases(bases.LINEAR)[0]
    folder = checkpoint(_crowded, case.config(modules_to_save=whole))
    inputs = case.base.inputs(3)
    expected = run(peft.PeftModel.from_pretrained(_crowded(), str(folder)), inputs)
    network = _crowded()
    before, output = Snapshot.of(network), run(network, inputs)
    model = splice.PeftModel.from_pretrained(network, folder)
    assert_close(run(model, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), output)
    assert network.head.merged == "my own"
    assert network.head.set_scale() == "my own as well"
    model.unload()
    before.assert_same(network)


@pytest.mark.parametrize("case", [*plain_cases(bases.LINEAR), *network_cases(bases.LLAMA)], ids=str)
def test_a_loaded_model_is_in_eval_mode(case: Case, shared_checkpoint: Any) -> None:
    """As the reference leaves it: the model, the tuner, the network and all its layers, whatever mode they were in."""
    network = case.base.build().train()
    layers = list(network.modules())
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(case.base, case.config()))
    assert not any(module.training for module in (model, model.base_model, *layers))
