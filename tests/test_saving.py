"""Saving: crashes and errors at any line, names that mean paths, and files that are the reference's for every option."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from splice.checkpoint.incoming import INCOMING_CONFIG
from tests import bases, broken
from tests.broken import (
    BIN,
    CONFIG,
    PACKAGE,
    SAFETENSORS,
    at_line,
    by_reference,
    files,
    in_fork,
    left_at_lines,
    lines_of,
    llama,
    load,
    output,
    parts,
)
from tests.comparing import assert_same_tensors
from tests.samples import Case, plain_cases

SAVING = tuple(f"{PACKAGE}/{name}.py" for name in ("loading/saving", "checkpoint/writing", "checkpoint/files"))
CARD = "README.md"
FORMS = {"safetensors": True, "bin": False}


class Pair:
    """Two adapters that differ in their weights and in the scale that their configs give: a mixture is neither."""

    def __init__(self, tmp_path: Path) -> None:
        self.old = load(parts(lora_alpha=8).write(tmp_path / "old"))
        self.new = load(parts(seed=1, lora_alpha=16).write(tmp_path / "new"))
        self.third = load(parts(seed=2, lora_alpha=24).write(tmp_path / "third"))
        self.outputs = {name: output(getattr(self, name)) for name in ("old", "new", "third")}

    def found_in(self, folder: Path) -> str:
        """Which of them `folder` holds, or "a mixture"."""
        found = output(load(folder))
        return next((name for name, expected in self.outputs.items() if torch.equal(found, expected)), "a mixture")


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def _killed(save: Callable[[], None], line: int) -> None:
    """Run `save` in a process that ends, without any clean-up, before its `line`-th line."""
    with at_line(line, lambda: os._exit(9), SAVING):
        save()


# -- a crash

State = dict[str, bytes]


def _key(state: State) -> tuple[tuple[str, bytes], ...]:
    """What tells a state of a folder from another; the numbers in names of temporary files are drawn."""
    return tuple((re.sub(r"\d+", "", name), data) for name, data in state.items())


def _different(states: list[State]) -> list[State]:
    """Each of them once, in their order."""
    first: dict[tuple[tuple[str, bytes], ...], State] = {}
    for state in states:
        first.setdefault(_key(state), state)
    return list(first.values())


def _restored(state: State, folder: Path) -> Path:
    """`folder`, with these files and no others."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in state.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def _crashes(model: Any, out: Path, safe: bool = True) -> list[State]:
    """What `out` holds after a crash of a save at each of its lines, and after all of it."""
    return left_at_lines(lambda: model.save_pretrained(out, safe), out, SAVING)


def _outline(state: State) -> dict[str, bytes | int]:
    """Of what is not finished the size alone: safetensors writes its metadata in any order, which is mended then."""
    return {name: len(data) if name.endswith(".tmp") else data for name, data in _key(state)}


@pytest.mark.parametrize("form", FORMS)
def test_what_crashes_leave_is_what_lies_there_before_each_line(form: str, pair: Pair, tmp_path: Path) -> None:
    """The tests below look into the folder at every line of one save. Here a process ends wherever that has changed."""
    safe, out = FORMS[form], tmp_path / "out"
    pair.old.save_pretrained(out, safe)
    states = _crashes(pair.new, out, safe)
    total = len(states) - 1
    changes = [line for line in range(1, total) if _key(states[line]) != _key(states[line - 1])]
    assert len(changes) > 6
    for line in (0, *changes, total):
        _restored(states[0], out)
        code = in_fork(lambda line=line: _killed(lambda: pair.new.save_pretrained(out, safe), line))
        assert code == (9 if line < total else 0)
        assert _outline(files(out)) == _outline(states[line]), f"line {line} of {total}"


@pytest.mark.parametrize("form", FORMS)
def test_a_crash_at_any_line_leaves_the_old_checkpoint_or_the_new(form: str, pair: Pair, tmp_path: Path) -> None:
    safe, out = FORMS[form], tmp_path / "out"
    pair.old.save_pretrained(out, safe)
    seen = [pair.found_in(_restored(state, out)) for state in _different(_crashes(pair.new, out, safe))]
    assert "a mixture" not in seen, f"states {[i for i, name in enumerate(seen) if name == 'a mixture']} of {len(seen)}"
    assert seen == sorted(seen, key=["old", "new"].index)
    assert set(seen) == {"old", "new"}


@pytest.mark.parametrize("form", FORMS)
def test_a_crash_in_an_empty_folder_leaves_nothing_or_the_new_one(form: str, pair: Pair, tmp_path: Path) -> None:
    out, loaded = tmp_path / "out", []
    for state in _different(_crashes(pair.new, out, FORMS[form])):
        try:
            loaded.append(pair.found_in(_restored(state, out)))
        except splice.CheckpointError:
            loaded.append("nothing")
    assert set(loaded) == {"nothing", "new"}


@pytest.mark.parametrize("form", FORMS)
def test_a_save_after_a_crash_is_whole(form: str, pair: Pair, tmp_path: Path) -> None:
    safe, out = FORMS[form], tmp_path / "out"
    pair.old.save_pretrained(out, safe)
    for state in _different(_crashes(pair.new, out, safe)):
        pair.third.save_pretrained(_restored(state, out), safe)
        assert pair.found_in(out) == "third"
        torch.testing.assert_close(output(by_reference(out)), pair.outputs["third"])


@pytest.mark.parametrize("form", FORMS)
def test_two_crashes_one_after_the_other(form: str, pair: Pair, tmp_path: Path) -> None:
    """The second one meets whatever state the first one left."""
    safe, out, mixtures = FORMS[form], tmp_path / "out", []
    pair.old.save_pretrained(out, safe)
    states = _different(_crashes(pair.new, out, safe))
    assert len(states) > 4
    for first in states:
        for second in _different(_crashes(pair.third, _restored(first, out), safe)):
            if pair.found_in(_restored(second, out)) == "a mixture":
                mixtures.append((sorted(first), sorted(second)))
    assert not mixtures, f"{len(mixtures)}, such as {mixtures[0]}"


def test_a_crash_while_a_safetensors_file_takes_the_place_of_a_pickle(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pair.old.save_pretrained(out, safe_serialization=False)
    for state in _different(_crashes(pair.new, out)):
        assert pair.found_in(_restored(state, out)) in ("old", "new"), sorted(state)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("what", [SAFETENSORS, CONFIG])
def test_a_crash_in_the_middle_of_a_file(
    what: str, share: float, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part of the bytes are on the disk when the process ends."""
    out = tmp_path / "out"
    pair.old.save_pretrained(out)

    def end_with_a_part_of(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        os._exit(9)

    def run() -> None:
        import safetensors.torch

        save_file, write_text = safetensors.torch.save_file, Path.write_text

        def half_save(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
            save_file(tensors, filename, *args, **kwargs)
            end_with_a_part_of(Path(filename))

        def half_write(self: Path, *args: Any, **kwargs: Any) -> None:
            write_text(self, *args, **kwargs)
            end_with_a_part_of(self)

        if what == SAFETENSORS:
            safetensors.torch.save_file = half_save
        else:
            Path.write_text = half_write  # type: ignore[method-assign,assignment]
        pair.new.save_pretrained(out)

    assert in_fork(run) == 9
    assert pair.found_in(out) == "old"
    pair.third.save_pretrained(out)
    assert pair.found_in(out) == "third"


def test_a_crash_between_two_adapters_leaves_each_old_or_new(tmp_path: Path) -> None:
    def both(seed: int, alpha: int) -> Any:
        model = load(parts(seed=seed, lora_alpha=alpha).write(tmp_path / f"a{seed}"))
        model.load_adapter(parts(seed=seed + 5, lora_alpha=alpha).write(tmp_path / f"b{seed}"), "other")
        return model

    old, new, out = both(0, 8), both(1, 16), tmp_path / "out"
    outputs = {}
    for model in (old, new):
        for name in ("default", "other"):
            model.set_adapter(name)
            outputs[name, model is new] = output(model)
    old.save_pretrained(out)
    for state in _different(_crashes(new, out)):
        _restored(state, out)
        for name, place in (("default", out), ("other", out / "other")):
            found = output(load(place))
            assert torch.equal(found, outputs[name, False]) or torch.equal(found, outputs[name, True]), (name, state)


def test_the_config_reads_alone_as_it_does_with_the_weights(pair: Pair, tmp_path: Path) -> None:
    """After a crash `PeftConfig.from_pretrained` gives the config of the adapter that a load gives."""
    out = tmp_path / "out"
    pair.old.save_pretrained(out)
    for state in _different(_crashes(pair.new, out)):
        _restored(state, out)
        assert splice.PeftConfig.from_pretrained(out).lora_alpha == load(out).peft_config["default"].lora_alpha


# -- an error


@pytest.mark.parametrize("form", FORMS)
def test_an_error_at_any_line_leaves_the_old_checkpoint_and_nothing_else(form: str, pair: Pair, tmp_path: Path) -> None:
    """The disk is full, or Ctrl-C is pressed: before the new weights are in place, nothing of the save is left."""
    safe, out = FORMS[form], tmp_path / "out"
    total = lines_of(lambda: pair.new.save_pretrained(tmp_path / "rehearsal", safe), SAVING)
    for line in range(0, total, 2):
        pair.old.save_pretrained(out, safe)
        before = files(out)
        with pytest.raises(broken.Interrupted), at_line(line, broken.interrupt, SAVING):
            pair.new.save_pretrained(out, safe)
        found = pair.found_in(out)
        assert found in ("old", "new"), f"line {line}"
        if found == "old":
            assert files(out) == before, f"line {line}"


def test_an_error_of_the_writer(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has written a part, then the disk is full."""
    out = tmp_path / "out"
    pair.old.save_pretrained(out)
    before = files(out)

    def full(tensors: Any, place: Any, *args: Any, **kwargs: Any) -> None:
        # One writes to a path, the other into an open file.
        write = place.write if hasattr(place, "write") else Path(place).write_bytes
        write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("torch.save", full)
    for safe in (True, False):
        with pytest.raises(OSError, match="No space left"):
            pair.new.save_pretrained(out, safe_serialization=safe)
        assert pair.found_in(out) == "old"
        assert files(out) == before


def test_a_config_that_cannot_be_written_leaves_the_old_checkpoint(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pair.old.save_pretrained(out)
    before = files(out)
    pair.new.peft_config["default"].loftq_config = {"a": object()}
    with pytest.raises(TypeError, match="adapter_config.json"):
        pair.new.save_pretrained(out)
    assert files(out) == before


def test_saving_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = load(parts().write(tmp_path / "in"), is_trainable=True)
    with broken.unchanged(model):
        model.save_pretrained(tmp_path / "out")
        model.save_pretrained(tmp_path / "out", safe_serialization=False)


def test_a_checkpoint_may_be_saved_over_the_one_that_was_loaded(tmp_path: Path) -> None:
    folder = parts().write(tmp_path)
    model = load(folder)
    expected = output(model)
    for _ in range(3):
        model.save_pretrained(folder)
        assert torch.equal(output(load(folder)), expected)
    assert sorted(files(folder)) == [CARD, CONFIG, SAFETENSORS]


@pytest.mark.parametrize("safe", [True, False])
def test_every_save_of_the_same_adapter_is_the_same_bytes(safe: bool, tmp_path: Path) -> None:
    """So that a checkpoint can be told by its hash."""
    model = load(parts().write(tmp_path / "in"))
    saved = []
    for number in range(8):
        model.save_pretrained(tmp_path / f"out{number}", safe_serialization=safe)
        saved.append(files(tmp_path / f"out{number}"))
    assert all(content == saved[0] for content in saved)


# -- names and places


@pytest.mark.parametrize("name", ["../outside", "..", ".", "a/../../outside", "/absolute", "nul\0"], ids=repr)
def test_a_name_that_means_a_path_writes_nothing_outside(name: str, tmp_path: Path) -> None:
    """Such an adapter is refused as soon as it is named, or when it is saved; never is a file written elsewhere."""
    name = name.replace("/absolute", str(tmp_path / "absolute"))
    model, other = load(parts().write(tmp_path / "in")), parts(seed=1).write(tmp_path / "other")
    model.save_pretrained(tmp_path / "out")
    before = files(tmp_path)
    try:
        model.load_adapter(other, name)
        model.save_pretrained(tmp_path / "out")
    except ValueError:
        pass
    else:
        pytest.fail(
            f"an adapter {name!r} was saved to {sorted(set(files(tmp_path)) - set(before)) or 'the place of another one'}"
        )
    assert set(files(tmp_path)) == set(before)
    assert torch.equal(output(load(tmp_path / "out")), output(load(tmp_path / "in")))


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    model, out = load(parts().write(tmp_path / "in")), tmp_path / "out"
    out.mkdir()
    others = {"notes.md": b"mine", "optimizer.pt": b"\0", "other/adapter_model.safetensors": b"old", BIN: b"older",
              ".hidden": b"", "adapter_config.json.bak": b"{}"}  # fmt: skip
    for name, data in others.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(data)
    model.save_pretrained(out)
    assert {name: data for name, data in files(out).items() if name in others} == others
    assert set(files(out)) - set(others) == {CARD, CONFIG, SAFETENSORS}


def test_a_pickle_beside_older_safetensors(tmp_path: Path) -> None:
    """What was saved last is what the next load reads. A load prefers safetensors, so the older file of these goes."""
    old, new, out = load(parts().write(tmp_path / "old")), load(parts(seed=1).write(tmp_path / "new")), tmp_path / "out"
    old.save_pretrained(out)
    new.save_pretrained(out, safe_serialization=False)
    assert set(files(out)) == {CARD, CONFIG, BIN}
    assert torch.equal(output(load(out)), output(new))
    old.save_pretrained(out)
    assert torch.equal(output(load(out)), output(old))


def test_a_crash_between_the_formats_leaves_the_old_checkpoint_or_the_new(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pair.old.save_pretrained(out)
    seen = [pair.found_in(_restored(state, out)) for state in _different(_crashes(pair.new, out, safe=False))]
    assert seen == sorted(seen, key=["old", "new"].index)
    assert set(seen) == {"old", "new"}


def test_a_folder_of_folders_that_are_not_there(tmp_path: Path) -> None:
    load(parts().write(tmp_path / "in")).save_pretrained(tmp_path / "a" / "b" / "c")
    assert load(tmp_path / "a" / "b" / "c").load_report.placed == 8


@pytest.mark.parametrize("place", [str, Path])
def test_kinds_of_places(place: Any, tmp_path: Path) -> None:
    load(parts().write(tmp_path / "in")).save_pretrained(place(tmp_path / "out"))
    assert set(files(tmp_path / "out")) == {CARD, CONFIG, SAFETENSORS}


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    model = load(parts().write(tmp_path / "in"))
    model.load_adapter(tmp_path / "in", "other")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("selected", [["nobody"], ["default", "nobody"], ["nobody", "default"]], ids=str)
def test_an_unknown_adapter_is_refused_before_anything_is_written(selected: list[str], tmp_path: Path) -> None:
    model = load(parts().write(tmp_path / "in"))
    with pytest.raises(ValueError, match=r"\['nobody'\]"):
        model.save_pretrained(tmp_path / "out", selected_adapters=selected)
    assert not (tmp_path / "out").exists()


def test_no_adapter_selected(tmp_path: Path) -> None:
    load(parts().write(tmp_path / "in")).save_pretrained(tmp_path / "out", selected_adapters=[])
    assert not (tmp_path / "out").exists() or not files(tmp_path / "out")


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path: Path) -> None:
    """Trainers that gather on the main process alone hand the others an empty state dict."""
    model = load(parts().write(tmp_path / "in"))
    model.save_pretrained(tmp_path / "out", is_main_process=False, state_dict={})
    with pytest.raises(KeyError, match="the given state_dict has none of"):
        model.save_pretrained(tmp_path / "out", state_dict={})
    with pytest.raises(KeyError, match="the given state_dict has none of"):
        model.save_pretrained(tmp_path / "out", is_main_process=False, state_dict={"else": torch.ones(1)})
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists() or not files(tmp_path / "out")


def test_the_base_that_is_named(tmp_path: Path) -> None:
    """Null at saving time, it is filled from the network; what the config says wins."""
    for named, own, expected in (
        (None, "someone/base", "someone/base"),
        ("a", "b", "a"),
        (None, "", None),
        (None, None, None),
    ):
        network = llama()
        network.name_or_path = own
        model = load(broken.edited(parts().write(tmp_path / "in"), base_model_name_or_path=named), network)
        model.save_pretrained(tmp_path / "out")
        assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == expected
        assert model.peft_config["default"].base_model_name_or_path == named


# -- the same files as the reference's


class Net(nn.Module):
    """A layer of every kind that has biases, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.convolution = nn.Conv1d(6, 6, 3, padding=1)
        self.linear = nn.Linear(6, 6)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.convolution(self.embed(x).movedim(1, 2)).movedim(1, 2)
        return self.head(torch.tanh(self.linear(hidden)).mean(1))


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["linear"]},
    "all kinds": {"target_modules": ["embed", "convolution", "linear"]},
    "an expression": {"target_modules": r"(lin|conv).*"},
    "all-linear": {"target_modules": "all-linear"},
    "a whole module": {"target_modules": ["linear"], "modules_to_save": ["head"]},
    "a whole module that is a target": {"target_modules": ["linear", "embed"], "modules_to_save": ["embed"]},
    "biases": {"target_modules": ["linear"], "bias": "all"},
    "biases of targets": {"target_modules": ["linear", "convolution"], "bias": "lora_only"},
    "a bias of its own": {"target_modules": ["linear"], "lora_bias": True},
    "patterns": {
        "target_modules": ["linear", "convolution"],
        "rank_pattern": {"linear": 2},
        "alpha_pattern": {"c.*": 3},
    },
    "rank-stabilised": {"target_modules": ["linear"], "use_rslora": True},
    "a parameter": {"target_modules": [], "target_parameters": ["linear.weight"]},
    "a task": {"target_modules": ["linear"], "task_type": "FEATURE_EXTRACTION"},
}


def _reference(options: dict[str, Any], folder: Path) -> Any:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        model = peft.get_peft_model(net(), peft.LoraConfig(r=4, init_lora_weights=False, **options)).eval()
        model.save_pretrained(str(folder), save_embedding_layers=False)
    return model


@pytest.mark.parametrize("what", OPTIONS)
def test_the_files_are_those_of_the_reference(what: str, tmp_path: Path) -> None:
    """Written by the reference, loaded and written again: the same names, bytes and fields. Then it loads it back."""
    x = torch.arange(15).reshape(3, 5)
    reference = _reference(OPTIONS[what], tmp_path / "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = splice.PeftModel.from_pretrained(net(), tmp_path / "reference")
    model.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    expected, ours = broken.tensors_in(tmp_path / "reference"), broken.tensors_in(tmp_path / "ours")
    assert set(ours) == set(expected)
    assert all(
        torch.equal(ours[name], tensor) and ours[name].dtype is tensor.dtype for name, tensor in expected.items()
    )
    assert _fields(tmp_path / "ours") == _fields(tmp_path / "reference")
    again = by_reference(tmp_path / "ours", net())
    torch.testing.assert_close(again.base_model(x), reference.base_model(x))
    torch.testing.assert_close(model.base_model(x), reference.base_model(x))


def _fields(folder: Path) -> dict[str, Any]:
    fields = json.loads((folder / CONFIG).read_text())
    fields.pop("peft_version")
    return {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}


@pytest.mark.parametrize("source", ["own", "the reference's", "of the network", "with more in it"])
@pytest.mark.parametrize("what", ["all kinds", "a whole module", "biases", "a bias of its own", "a parameter"])
def test_a_state_dict_of_the_whole_model(what: str, source: str, tmp_path: Path) -> None:
    """Trainers gather it and hand it over; its tensors are saved instead of the model's own."""
    reference = _reference(OPTIONS[what], tmp_path / "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = splice.PeftModel.from_pretrained(net(), tmp_path / "reference")
    given = (reference if source == "the reference's" else model).state_dict()
    if source == "of the network":
        given = {f"base_model.model.{name}": tensor for name, tensor in model.get_base_model().state_dict().items()}
    doubled = {name: tensor * 2 for name, tensor in given.items()}
    if source == "with more in it":
        doubled["something.else"] = torch.ones(1)
    names = list(doubled)
    model.save_pretrained(tmp_path / "ours", state_dict=doubled)
    assert list(doubled) == names
    expected, ours = broken.tensors_in(tmp_path / "reference"), broken.tensors_in(tmp_path / "ours")
    for name in ours.keys() & expected.keys():
        assert torch.equal(ours[name], expected[name] * 2), name
    assert ours.keys() & expected.keys()


@pytest.mark.parametrize("case", plain_cases(bases.LLAMA), ids=str)
def test_a_state_dict_is_saved_as_if_it_were_on_the_model(case: Case, tmp_path: Path) -> None:
    """Whatever a method works out of its tensors for a checkpoint, it works out of those that are given."""
    models = []
    for _ in range(2):
        torch.manual_seed(4)
        models.append(splice.get_peft_model(case.base.build(), splice.get_peft_config(case.config())))
    model, other = models
    own = [name for name in model.state_dict() if "default" in name.split(".")]
    given = {n: t * 1.1 if n in own and t.is_floating_point() else t for n, t in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=given)
    other.load_state_dict(given)
    other.save_pretrained(tmp_path / "own")
    expected = broken.tensors_in(tmp_path / "own")
    assert_same_tensors(broken.tensors_in(tmp_path / "given"), expected)
    assert expected


def test_shared_and_transposed_tensors_are_written_whole(tmp_path: Path) -> None:
    model = load(parts().write(tmp_path / "in"))
    tensors = list(broken.adapter_tensors(model).values())
    same_shape = [tensor for tensor in tensors if tensor.shape == tensors[0].shape]
    same_shape[1].data = same_shape[0].data
    tensors[1].data = tensors[1].data.T.contiguous().T
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(output(load(tmp_path / "out")), output(model))
    torch.testing.assert_close(output(by_reference(tmp_path / "out")), output(model))


def test_metadata_says_pt(tmp_path: Path) -> None:
    """transformers refuses files that do not."""
    from safetensors import safe_open

    load(parts().write(tmp_path / "in")).save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / SAFETENSORS, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_leftover_config_of_an_old_crash_is_not_taken(tmp_path: Path) -> None:
    """Only where the weights name it."""
    model, out = load(parts(lora_alpha=8).write(tmp_path / "in")), tmp_path / "out"
    model.save_pretrained(out)
    config = json.loads((out / CONFIG).read_text())
    (out / INCOMING_CONFIG).write_text(json.dumps({**config, "lora_alpha": 800}))
    assert torch.equal(output(load(out)), output(model))
    (out / INCOMING_CONFIG).write_bytes(b"\xff")
    assert torch.equal(output(load(out)), output(model))


@pytest.mark.parametrize("edit", ["by hand", "by its own method"])
def test_a_config_that_is_edited_after_saving_counts(edit: str, tmp_path: Path) -> None:
    """The weights name the config they were saved with; that must not bring it back."""
    model, out = load(parts(lora_alpha=8).write(tmp_path / "in")), tmp_path / "out"
    model.save_pretrained(out)
    if edit == "by hand":
        broken.edited(out, lora_alpha=80)
    else:
        config = splice.PeftConfig.from_pretrained(out)
        config.lora_alpha = 80
        config.save_pretrained(out)
    assert load(out).peft_config["default"].lora_alpha == 80


def test_saving_by_the_reference_over_a_crashed_save(pair: Pair, tmp_path: Path) -> None:
    """Whatever a crash of splice left lying, a save by the reference counts."""
    out = tmp_path / "out"
    third = by_reference(tmp_path / "third")
    pair.old.save_pretrained(out)
    for state in _different(_crashes(pair.new, out)):
        _restored(state, out)
        third.save_pretrained(str(out), save_embedding_layers=False)
        assert pair.found_in(out) == "third"


def test_of_a_part_of_a_state_dict_the_result_is_a_part(tmp_path: Path) -> None:
    """As trainers pass it that send a model piece by piece."""
    model = load(parts().write(tmp_path / "in"))
    full, own = dict(model.state_dict()), splice.get_peft_model_state_dict(model)
    one = next(name for name in full if "lora_A" in name)
    part = splice.get_peft_model_state_dict(model, {one: full[one] * 2, "else": torch.ones(1)})
    (key,) = part
    assert torch.equal(part[key], own[key] * 2)
    assert splice.get_peft_model_state_dict(model, {}) == {}


@pytest.mark.parametrize("unwrap", [True, False])
def test_a_compiled_model_is_the_one_that_was_compiled(unwrap: bool, tmp_path: Path) -> None:
    model = load(parts().write(tmp_path / "in"))
    compiled, own = torch.compile(model), splice.get_peft_model_state_dict(model)
    for given in (None, compiled.state_dict()):
        found = splice.get_peft_model_state_dict(compiled, given, unwrap_compiled=unwrap)
        assert list(found) == list(own) and all(torch.equal(found[key], own[key]) for key in own)
    twice = {key: tensor.detach() * 2 for key, tensor in own.items()}
    splice.set_peft_model_state_dict(compiled, twice)
    again = splice.get_peft_model_state_dict(model)
    assert all(torch.equal(again[key], twice[key]) for key in own)
