# ruff: noqa: E501, PT017
"""Whatever goes wrong in a load, and wherever: the model is what it was, other adapters work, and a good load follows."""

from __future__ import annotations

import copy
import gc
import pickle
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from splice import errors
from tests import broken
from tests.broken import (
    Interrupted,
    Parts,
    assert_unchanged,
    at_call,
    at_line,
    by_reference,
    in_fork,
    interrupt,
    lines_of,
    llama,
    load,
    output,
    parts,
    picture,
    unchanged,
)

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


# -- the classes


@pytest.mark.parametrize(
    ("cls", "bases"),
    [
        (errors.PeftWarning, (UserWarning,)),
        (errors.NoMatchingPeftModuleError, (errors.PeftError, ValueError)),
        (errors.CheckpointError, (errors.PeftError, ValueError)),
        (errors.UnknownMethodError, (errors.PeftError, KeyError)),
        (errors.UnsupportedFeatureError, (errors.PeftError, NotImplementedError)),
        (errors.AdapterMismatchError, (errors.PeftError, RuntimeError)),
    ],
)
def test_what_callers_can_catch(cls: type[Exception], bases: tuple[type, ...]) -> None:
    for base in bases:
        assert issubclass(cls, base)


@pytest.mark.parametrize("cls", [errors.CheckpointError, errors.UnknownMethodError, errors.NoMatchingPeftModuleError])
def test_the_message_is_shown_as_it_is(cls: type[Exception]) -> None:
    assert str(cls("it's so\nand so")) == "it's so\nand so"


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "deepcopy", "pickle"]
)
def test_errors_travel_between_processes(again: Callable[[Any], Any]) -> None:
    error = errors.AdapterMismatchError("message", ["a"], ["b", "c"], ["d"])
    other = again(error)
    assert (str(other), other.missing, other.unexpected, other.mismatched) == ("message", ["a"], ["b", "c"], ["d"])
    assert str(again(errors.UnknownMethodError("message"))) == "message"


# -- the same kind of exception as the reference, for the same mistake


def _config(**fields: Any) -> Callable[[Parts], Parts]:
    return lambda p: Parts(p.tensors, {**p.config, **fields})


def _without_field(name: str) -> Callable[[Parts], Parts]:
    return lambda p: Parts(p.tensors, {k: v for k, v in p.config.items() if k != name})


def _with(name: str, tensor: torch.Tensor) -> Callable[[Parts], Parts]:
    return lambda p: Parts({**p.tensors, name: tensor}, p.config)


ALIKE: dict[str, Callable[[Parts], Parts]] = {
    "unknown peft_type": _config(peft_type="SUPERLORA"),
    "lower-case peft_type": _config(peft_type="lora"),
    "unknown task_type": _config(task_type="PREDICT_LOTTERY"),
    "rank 0": _config(r=0),
    "negative rank": _config(r=-4),
    "no such targets": _config(target_modules=["wq"]),
    "a container as target": _config(target_modules=["self_attn"]),
    "layers with an expression": _config(target_modules=".*q_proj", layers_to_transform=[0]),
    "a pattern without layers": _config(layers_pattern="layers"),
    "another rank": _config(r=8),
    "another shape": _with(f"{Q0}.lora_A.weight", torch.ones(4, 15)),
    "transposed": _with(f"{Q0}.lora_A.weight", torch.ones(16, 4)),
    "a scalar": _with(f"{Q0}.lora_A.weight", torch.tensor(1.0)),
    "another number of dimensions": _with(f"{Q0}.lora_A.weight", torch.ones(4, 16, 1)),
    "dora with a bias": _config(use_dora=True, lora_bias=True),
    "a name for parameters": _config(target_parameters="weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", ALIKE)
def test_the_same_mistake_is_the_same_kind_of_exception(what: str, tmp_path: Path) -> None:
    """Code that catches what the reference raises catches what splice raises."""
    folder, model = ALIKE[what](parts()).write(tmp_path), llama()
    with pytest.raises(Exception) as theirs:
        by_reference(folder)
    builtin = next(c for c in type(theirs.value).__mro__ if c.__module__ == "builtins")
    with unchanged(model), pytest.raises(builtin):
        load(folder, model)


def test_a_method_of_the_reference_that_is_refused_here(tmp_path: Path) -> None:
    """Every kind of adapter that the reference knows and splice does not load is refused by its name."""
    from splice.kinds.registry import all_methods

    model = llama()
    for name in peft.PeftType:
        if splice.PeftType(name.value) in all_methods():
            continue
        folder = _config(peft_type=name.value)(parts()).write(tmp_path / name.value)
        with (
            unchanged(model),
            pytest.raises(KeyError, match=f"adapters of the method '{name.value}' cannot be loaded by this version"),
        ):
            load(folder, model)


# -- configs that ask for the impossible


HUGE = 100_000_000


@pytest.mark.parametrize(
    "fields",
    [
        {"r": HUGE},
        {"r": 10**30},
        {"rank_pattern": {"q_proj": HUGE}},
        {"layers_to_transform": list(range(100_000)), "r": HUGE},
    ],
    ids=["rank", "rank beyond 64 bits", "rank of a pattern", "many layers"],
)
def test_a_huge_rank_takes_no_memory(fields: dict[str, Any], tmp_path: Path) -> None:
    """In a process that may have 500 MB more than it has; such a tensor alone would need 6 GB."""
    folder = _config(**fields)(parts()).write(tmp_path)

    def run() -> None:
        model = llama()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000,) * 2)
        with unchanged(model), pytest.raises((errors.AdapterMismatchError, ValueError)):
            load(folder, model)

    assert in_fork(run) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"r": "4"}, {"r": None}, {"r": 4.0}, {"r": True}, {"r": [4]}, {"r": {}},
        {"lora_alpha": "8"}, {"lora_alpha": None}, {"lora_alpha": [8]},
        {"rank_pattern": {"q_proj": "4"}}, {"rank_pattern": {"q_proj": 0}}, {"rank_pattern": ["q_proj"]},
        {"rank_pattern": None}, {"rank_pattern": {"(": 4}}, {"alpha_pattern": {"q_proj": "8"}}, {"alpha_pattern": [8]},
        {"target_modules": 3}, {"target_modules": [1, 2]}, {"target_modules": [None]}, {"target_modules": {"q_proj": 1}},
        {"target_modules": "("}, {"target_modules": [["q_proj"]]},
        {"exclude_modules": 3}, {"exclude_modules": "("},
        {"modules_to_save": "lm_head"}, {"modules_to_save": 3}, {"modules_to_save": ["../../etc"]},
        {"modules_to_save": ["("]}, {"modules_to_save": [""]}, {"modules_to_save": [None]},
        {"layers_to_transform": "0"}, {"layers_to_transform": ["0"]}, {"layers_to_transform": [0], "layers_pattern": "("},
        {"bias": "some"}, {"bias": None}, {"bias": True},
        {"lora_dropout": "0.1"}, {"lora_dropout": -1}, {"lora_dropout": 2.0}, {"lora_dropout": None},
        {"init_lora_weights": "magic"}, {"init_lora_weights": 3}, {"use_rslora": "false"},
        {"fan_in_fan_out": "no"}, {"task_type": 3}, {"task_type": []}, {"peft_type": None}, {"peft_type": []},
        {"target_parameters": [3]}, {"target_parameters": {"a": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_fields_of_the_wrong_kind(fields: dict[str, Any], tmp_path: Path) -> None:
    """Refused with an exception that says something, or read as the reference reads it; never half of either."""
    folder, model = _config(**fields)(parts()).write(tmp_path), llama()
    before = picture(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = splice.PeftModel.from_pretrained(model, folder)
    except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError) as error:
        assert_unchanged(before, model)
        assert len(str(error)) > 20, repr(error)
    else:
        try:
            expected = output(by_reference(folder))
        except Exception:
            # Read for what it can only mean, and said so.
            assert any(name in note for name in fields for note in loaded.load_report.notes)
            expected = output(load(parts().write(tmp_path / "plain")))
        torch.testing.assert_close(output(loaded), expected)


# -- names of tensors


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "base_model.model...//lora_A.weight", "base_model.model.", "", ".", "base_model.model.lora_A.weight",
     f"{Q0}.lora_A.weight.lora_A.weight", f"{Q0}..lora_A.weight", f" {Q0}.lora_A.weight", f"{Q0}.lora_A.weight ",
     f"{Q0}.lora_A.bias", f"{Q0}.lora_C.weight", f"{Q0}.base_layer.weight", f"{Q0}.weight", f"{Q0}.lora_A", f"{Q0}.lora_a.weight",
     "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight", "base_model.model.config.vocab_size",
     f"{Q0}.__class__", f"{Q0}.forward", "base_model.model.__dict__.x", "base_model.model.model.layers.-1.q_proj.lora_A.weight",
     "x" * 1_000, "\0", "\u202e", "base_model.model.model.norm.weight", f"{Q0}.adapters.default.lora_A.weight"],
    ids=lambda name: repr(name[:60]),
)  # fmt: skip
def test_a_tensor_of_any_other_name_is_refused(name: str, tmp_path: Path) -> None:
    folder, model = _with(name, torch.ones(2))(parts()).write(tmp_path), llama()
    with unchanged(model), pytest.raises(errors.AdapterMismatchError) as caught:
        load(folder, model)
    assert caught.value.unexpected == [name]
    assert "8 of 8 tensors" in str(caught.value)
    assert len(str(caught.value)) < 3000
    other = load(parts(seed=1).write(tmp_path / "good"))
    with unchanged(other), pytest.raises(errors.AdapterMismatchError):
        other.load_adapter(folder, "bad")
    with unchanged(other), pytest.raises(errors.AdapterMismatchError):
        other.load_adapter(folder, "default")


def test_a_tensor_for_another_adapter_is_refused(tmp_path: Path) -> None:
    """The reference would overwrite that adapter."""
    model = load(parts().write(tmp_path / "a"), adapter_name="first")
    folder = _with(f"{Q0}.lora_A.first.weight", torch.ones(4, 16))(parts(seed=1)).write(tmp_path / "b")
    with unchanged(model), pytest.raises(errors.AdapterMismatchError, match="lora_A.first.weight"):
        model.load_adapter(folder, "second")


# -- an interrupt, or an error, anywhere

Run = Callable[[], Any]


class Scene:
    """A load that can be repeated: `model` is what must not change, `run` loads, `undo` takes a finished load back."""

    def __init__(self, model: Any, run: Run, undo: Run) -> None:
        self.model, self.run, self.undo = model, run, undo


def _unload(model: nn.Module) -> None:
    model.__dict__["splice_tuner"][0].unload()


def _fresh(tmp_path: Path) -> Scene:
    model, folder = llama(), parts().write(tmp_path)
    return Scene(model, lambda: load(folder, model), lambda: _unload(model))


def _in_training(tmp_path: Path) -> Scene:
    """Loaded for inference, onto a model in training mode some of whose parameters were frozen."""
    model, folder = llama().train(), parts().write(tmp_path)
    model.lm_head.weight.requires_grad = False
    model.model.norm.eval()

    def undo() -> None:
        _unload(model)
        model.train()
        model.model.norm.eval()

    return Scene(model, lambda: load(folder, model), undo)


def _with_everything(tmp_path: Path) -> Scene:
    """For training, with whole modules and biases, onto a BERT with a head."""
    network = broken.bert()
    made = parts(network=broken.bert(), task_type="SEQ_CLS", target_modules=["query", "value"], bias="all")
    folder = made.write(tmp_path)
    return Scene(network, lambda: load(folder, network, is_trainable=True), lambda: _unload(network))


def _beside(tmp_path: Path) -> Scene:
    folder = parts().write(tmp_path / "a")
    model = load(folder, adapter_name="there")
    second = parts(seed=1, target_modules=["q_proj", "k_proj"]).write(tmp_path / "b")
    return Scene(model, lambda: model.load_adapter(second, "new", is_trainable=True), lambda: _delete_new(model))


def _over(tmp_path: Path) -> Scene:
    """New weights for an adapter that is there."""
    first, second = parts().write(tmp_path / "a"), parts(seed=1).write(tmp_path / "b")
    model = load(first, is_trainable=True)

    def undo() -> None:
        model.load_adapter(first, "default", is_trainable=True)
        model.training, model.load_report = True, None

    return Scene(model, lambda: model.load_adapter(second, "default"), undo)


def _delete_new(model: Any) -> None:
    model.delete_adapter("new")
    model.load_report = None


def _state_dict(tmp_path: Path) -> Scene:
    first, second = parts(), parts(seed=1).tensors
    model = load(first.write(tmp_path / "a"))
    return Scene(
        model,
        lambda: splice.set_peft_model_state_dict(model, second),
        lambda: splice.set_peft_model_state_dict(model, first.tensors),
    )


def _new(tmp_path: Path) -> Scene:
    """Not a load: a new adapter beside one that is there."""
    model = load(parts().write(tmp_path))
    config = splice.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    return Scene(model, lambda: model.add_adapter("new", copy.deepcopy(config)), lambda: model.delete_adapter("new"))


def _first_new(tmp_path: Path) -> Scene:
    model = llama()
    config = splice.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    return Scene(model, lambda: splice.get_peft_model(model, copy.deepcopy(config)), lambda: _unload(model))


def _attention(tmp_path: Path) -> Scene:
    """Layers whose parents read their weights, and that are guarded."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    made = parts(network=copy.deepcopy(model), task_type=None, target_modules=["linear1", "linear2"])
    folder = made.write(tmp_path)
    return Scene(model, lambda: load(folder, model), lambda: _unload(model))


SCENES = {scene.__name__.strip("_"): scene for scene in
          (_fresh, _in_training, _with_everything, _beside, _over, _state_dict, _new, _first_new, _attention)}  # fmt: skip


NOT_REACHED = "not reached"


def _interrupt_at(scene: Scene, before: dict[str, Any], number: int) -> str:
    """What is wrong after an interrupt at this line; nothing, mostly, and NOT_REACHED where there are fewer lines."""
    where: list[str] = []
    try:
        with at_line(number, interrupt) as where:
            scene.run()
    except Interrupted:
        pass
    else:
        return NOT_REACHED
    try:
        assert_unchanged(before, scene.model)
        assert gc.isenabled() or "without_collections" in where[0]
    except AssertionError as error:
        return f"interrupted at {where[0]}: {str(error)[:600]}"
    finally:
        gc.enable()
    return ""


def _interrupt_every(step: int, start: int, name: str, tmp_path: Path) -> None:
    scene = SCENES[name](tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scene.run()  # once, so that what is imported or cached is so afterwards
        scene.undo()
        total = lines_of(scene.run)
        scene.undo()
    before = picture(scene.model)
    for number in range(start, total, step):
        wrong = _interrupt_at(scene, before, number)
        if wrong == NOT_REACHED and number > 0.9 * total:
            # Memory for tensors was there, since the error that is being handled still holds that of the load before it.
            scene.undo()
            break
        assert not wrong, f"line {number} of {total}: {wrong}"
    scene.run()
    scene.undo()
    assert_unchanged(before, scene.model)


@pytest.mark.parametrize("name", SCENES)
def test_an_interrupt_anywhere_leaves_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    _interrupt_every(23, 7, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
def test_an_interrupt_at_every_line_leaves_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    _interrupt_every(1, 0, name, tmp_path)


POINTS: dict[str, tuple[str, ...]] = {
    "the reader": ("splice.checkpoint.tensors.SafetensorsFile.begin_to_read",),
    "the reader's system call": ("os.preadv",),
    "an adapter layer": ("splice.kinds.layer.AdapterLayer.__init__",),
    "attaching a layer": ("splice.surgery.tuner.attach",),
    "freezing": ("splice.surgery.base_changes.BaseChanges.make",),
    "the flags": ("splice.surgery.tuner.Tuner.set_requires_grad",),
    "the report": ("splice.loading.load.report",),
    "going into eval mode": ("splice.model.PeftModel._after_load",),
    "selecting": ("splice.selection.Selection.set",),
}


@pytest.mark.parametrize(
    "error", [RuntimeError("injected"), MemoryError("injected"), KeyboardInterrupt("injected")], ids=repr
)
@pytest.mark.parametrize("call", [0, 1, 3])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside others"])
def test_an_error_inside(
    beside: bool, point: str, call: int, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = parts().write(tmp_path)
    model: Any = llama()
    if beside:
        model = load(folder, model, adapter_name="there")
    expected, before = output(model), picture(model)
    run = (
        (lambda: model.load_adapter(folder, "new", is_trainable=True))
        if beside
        else lambda: load(folder, model, is_trainable=True)
    )
    monkeypatch.setattr("splice.loading.commit._BATCH_BYTES", 1)
    for name in POINTS[point]:
        monkeypatch.setattr(name, at_call(_resolved(name), call, error))
    try:
        run()
    except type(error) as caught:
        assert caught is error
        assert_unchanged(before, model)
        assert torch.equal(output(model), expected)
    else:
        if beside or call:
            return  # it is not called so often
        pytest.fail("it was not called")
    monkeypatch.undo()
    loaded = run()
    if beside:
        assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
        model.set_adapter("new")
        assert torch.equal(output(model), expected)
    else:
        assert torch.equal(output(loaded), output(load(folder)))


def _resolved(name: str) -> Any:
    import importlib

    parts_of_name = name.split(".")
    for length in range(len(parts_of_name) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts_of_name[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts_of_name[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


def test_a_base_layer_with_a_module_of_an_adapters_name() -> None:
    """Its own module would be lost under the adapter's tensors."""

    class OwnFactors(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.lora_A = nn.Linear(8, 2)

    network = nn.Sequential(nn.Linear(8, 8), OwnFactors())
    before = picture(network)
    with pytest.raises(ValueError, match=r"has a Linear of its own named 'lora_A'.*exclude_modules"):
        splice.get_peft_model(network, splice.LoraConfig(target_modules=["0", "1"]))
    assert_unchanged(before, network)


def test_a_module_that_refuses_eval_mode(tmp_path: Path) -> None:
    """User code that raises in the middle of a load, after the adapter was attached."""

    class Stubborn(nn.Identity):
        def train(self, mode: bool = True) -> Any:
            if not mode:
                raise RuntimeError("never in eval mode")
            return super().train(mode)

    model, folder = llama(), parts().write(tmp_path)
    model.stubborn = Stubborn()
    model.stubborn.training = True
    with unchanged(model), pytest.raises(RuntimeError, match="never in eval mode"):
        load(folder, model)


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    made = parts()
    name = next(iter(made.tensors))
    folder = Parts({n: t for n, t in made.tensors.items() if n != name}, made.config).write(tmp_path)
    model = llama()
    with unchanged(model), warnings.catch_warnings(), pytest.raises(errors.PeftWarning):
        warnings.simplefilter("error")
        splice.PeftModel.from_pretrained(model, folder, strict=False)


def test_a_failed_load_leaves_the_collector_and_the_random_state_alone(tmp_path: Path) -> None:
    folder = _config(r=8)(parts()).write(tmp_path)
    model, before = llama(), torch.get_rng_state()
    with pytest.raises(errors.AdapterMismatchError):
        load(folder, model)
    assert gc.isenabled()
    assert torch.equal(torch.get_rng_state(), before)
    gc.disable()
    try:
        load(parts().write(tmp_path / "good"), model)
        assert not gc.isenabled()
    finally:
        gc.enable()


# -- arguments


@pytest.mark.parametrize("name", ["", "__base__", None, 3, b"bytes"], ids=repr)
def test_names_that_no_adapter_can_have(name: Any, tmp_path: Path) -> None:
    folder = parts().write(tmp_path)
    model, loaded = llama(), load(folder)
    config = splice.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with unchanged(model, loaded):
        for function in (
            lambda: load(folder, model, adapter_name=name),
            lambda: loaded.load_adapter(folder, name),
            lambda: loaded.add_adapter(name, config),
            lambda: splice.get_peft_model(model, config, name),
        ):
            with pytest.raises((ValueError, TypeError), match="adapter_name"):
                function()


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    folder = parts().write(tmp_path)
    model = llama()
    loaded = load(folder, model)
    config = splice.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with unchanged(loaded):
        with pytest.raises(ValueError, match="'default' already exists"):
            load(folder, model)
        with pytest.raises(ValueError, match="'default' already exists"):
            loaded.add_adapter("default", config)
        with pytest.raises(ValueError, match="'default' already exists"):
            splice.get_peft_model(model, config)


def test_a_peft_model_in_place_of_a_base_model(tmp_path: Path) -> None:
    loaded = load(parts().write(tmp_path))
    config = splice.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with unchanged(loaded):
        with pytest.raises(ValueError, match=r"a PeftModel already.*\['default'\].*load_adapter.*unload"):
            load(tmp_path, loaded, adapter_name="second")
        with pytest.raises(ValueError, match="a PeftModel already"):
            splice.get_peft_model(loaded, config, "second")


@pytest.mark.parametrize(
    "config", [{"r": 4}, "LORA", 3, peft.LoraConfig(r=4), splice.LoraConfig], ids=lambda c: type(c).__name__
)
def test_a_config_of_the_wrong_type(config: Any, tmp_path: Path) -> None:
    folder, model = parts().write(tmp_path), llama()
    with unchanged(model), pytest.raises(ValueError, match="must be a PeftConfig"):
        load(folder, model, config=config)


@pytest.mark.parametrize("model", [None, "someone/base", {}, 3], ids=repr)
def test_what_is_no_model(model: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError, AttributeError)):
        splice.PeftModel.from_pretrained(model, parts().write(tmp_path))


def test_another_method_beside_the_first(tmp_path: Path) -> None:
    model = load(parts().write(tmp_path / "a"))
    made = parts(seed=1)
    made.config.update(peft_type="PROMPT_TUNING", num_virtual_tokens=4)
    folder = Parts({"prompt_embeddings": torch.ones(4, 16)}, made.config).write(tmp_path / "b")
    with unchanged(model), pytest.raises(ValueError, match="different peft types"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_adapter(folder, "second")


def test_a_second_adapter_with_biases(tmp_path: Path) -> None:
    network = broken.bert
    made = [parts(seed, network(), task_type="SEQ_CLS", target_modules=["query"], bias="all") for seed in (0, 1)]
    model = load(made[0].write(tmp_path / "a"), network())
    with unchanged(model), pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.load_adapter(made[1].write(tmp_path / "b"), "second")


def test_a_merged_adapter_takes_no_new_weights(tmp_path: Path) -> None:
    folder = parts().write(tmp_path)
    model = load(folder)
    model.merge_adapter()
    with unchanged(model), pytest.raises(ValueError, match=r"is merged; call `unmerge_adapter\(\)`"):
        model.load_adapter(folder, "default")
    with unchanged(model), pytest.raises(ValueError, match="is merged"):
        splice.set_peft_model_state_dict(model, parts(seed=1).tensors)


def test_values_that_are_no_numbers_load_as_they_are(tmp_path: Path) -> None:
    """As in the reference: whether NaN is damage, only the one who trained it knows."""
    made = parts()
    folder = Parts({n: torch.full_like(t, float("nan")) for n, t in made.tensors.items()}, made.config).write(tmp_path)
    assert all(tensor.isnan().all() for tensor in broken.adapter_tensors(load(folder)).values())
