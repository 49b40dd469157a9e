"""What is read from a checkpoint belongs to the model alone, and nothing but tensors is ever read from a pickle."""

from __future__ import annotations

import collections
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import splice
from splice.checkpoint.tensors import SafetensorsFile, TensorsInMemory, open_weights
from tests import broken
from tests.broken import BIN, SAFETENSORS, Parts, by_reference, in_fork, llama, load, output, parts
from tests.comparing import named

WEIGHTS = {"safetensors": SAFETENSORS, "bin": BIN}


def written(folder: Path, form: str, seed: int = 0) -> Path:
    return parts(seed=seed).write(folder, as_bin=form == "bin")


def assert_owned(tensors: list[torch.Tensor]) -> None:
    """Each has memory of its own, and no more of it than it needs."""
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.is_contiguous()


# -- the file may go away


def _truncated(file: Path) -> None:
    with open(file, "r+b") as handle:
        handle.truncate(0)


def _overwritten(file: Path) -> None:
    size = file.stat().st_size
    with open(file, "r+b") as handle:
        handle.write(b"\xff" * size)


def _replaced(file: Path) -> None:
    file.write_bytes(b"something else")


@pytest.mark.parametrize("happen", [_truncated, _overwritten, _replaced, Path.unlink])
@pytest.mark.parametrize("form", WEIGHTS)
def test_what_happens_to_the_file_afterwards_changes_nothing(
    form: str, happen: Callable[[Path], None], tmp_path: Path
) -> None:
    """In a process of its own, which would end by a signal if the file were mapped."""
    folder = written(tmp_path, form)

    def run() -> None:
        model = load(folder)
        dictionary = splice.load_peft_weights(folder)
        kept = {name: tensor.clone() for name, tensor in dictionary.items()}
        before = output(model)
        happen(folder / WEIGHTS[form])
        assert torch.equal(output(model), before)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in dictionary.items())

    assert in_fork(run) == 0


@pytest.mark.parametrize("form", WEIGHTS)
def test_no_file_is_left_open(form: str, tmp_path: Path) -> None:
    folder = written(tmp_path, form)
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc")
    model = load(folder)
    opened = [str(link.resolve()) for link in descriptors.iterdir()]
    mapped = Path("/proc/self/maps").read_text()
    assert not [name for name in opened if str(tmp_path) in name]
    assert str(tmp_path) not in mapped
    assert model.load_report.placed == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", WEIGHTS)
def test_every_loaded_tensor_owns_its_memory(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load(written(tmp_path, form), llama().to(dtype))
    tensors = list(broken.adapter_tensors(model).values())
    assert len(tensors) == 8
    assert_owned([*tensors, *(p for p in model.parameters() if p.numel() > 700)])


@pytest.mark.parametrize("form", WEIGHTS)
def test_every_tensor_of_the_dict_owns_its_memory(form: str, tmp_path: Path) -> None:
    assert_owned(list(splice.load_peft_weights(written(tmp_path, form)).values()))


def test_views_of_one_tensor_in_a_pickle_become_tensors_of_their_own(tmp_path: Path) -> None:
    made = parts()
    (tmp_path / "views").mkdir()
    whole = torch.cat([tensor.reshape(-1) for tensor in made.tensors.values()])
    views, start = {}, 0
    for name, tensor in made.tensors.items():
        views[name] = whole[start : start + tensor.numel()].reshape(tensor.shape)
        start += tensor.numel()
    folder = made.write(tmp_path / "views", as_bin=True)
    torch.save(views, folder / BIN)
    model = load(folder)
    assert_owned(list(broken.adapter_tensors(model).values()))
    assert_owned(list(splice.load_peft_weights(folder).values()))
    assert torch.equal(output(model), output(load(made.write(tmp_path / "straight"))))


def test_one_tensor_under_two_names_becomes_two(tmp_path: Path) -> None:
    made = parts()
    shared = torch.randn(4, 16)
    folder = made.write(tmp_path, as_bin=True)
    tensors = {name: shared if "lora_A" in name else tensor for name, tensor in made.tensors.items()}
    torch.save(tensors, folder / BIN)
    loaded = broken.adapter_tensors(load(folder))
    assert_owned(list(loaded.values()))
    assert all(torch.equal(t, shared) for name, t in loaded.items() if "lora_A" in name)


def test_transposed_tensors_and_parameters_in_a_pickle(tmp_path: Path) -> None:
    made = parts()
    folder = made.write(tmp_path / "odd", as_bin=True)
    torch.save({n: torch.nn.Parameter(t.T.contiguous().T) for n, t in made.tensors.items()}, folder / BIN)
    model = load(folder)
    assert_owned(list(broken.adapter_tensors(model).values()))
    assert not any(tensor.requires_grad for tensor in model.parameters())
    assert torch.equal(output(model), output(load(made.write(tmp_path / "straight"))))


def test_a_dict_given_by_the_caller_stays_the_callers(tmp_path: Path) -> None:
    model, given = load(parts().write(tmp_path)), parts(seed=1).tensors
    splice.set_peft_model_state_dict(model, given)
    before = output(model)
    for tensor in given.values():
        tensor.zero_()
    assert torch.equal(output(model), before)


def test_a_load_draws_no_random_numbers(tmp_path: Path) -> None:
    """What is about to be overwritten is not initialised first."""
    folder = parts().write(tmp_path)
    network, before = llama(), torch.get_rng_state()
    load(folder, network)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_load_needs_little_more_memory_than_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a half-precision base, whose adapter is cast: read piece by piece, so that it is never there twice."""
    made: list[int] = []
    read = SafetensorsFile.begin_to_read

    def counted(self: SafetensorsFile, names: Any, into: Any = None) -> Any:
        reading = read(self, names, into)
        made.append(sum(tensor.nbytes for tensor in reading.tensors))
        return reading

    monkeypatch.setattr(SafetensorsFile, "begin_to_read", counted)
    monkeypatch.setattr("splice.loading.commit._BATCH_BYTES", 300)
    load(parts().write(tmp_path), llama().to(torch.bfloat16), autocast_adapter_dtype=False)
    assert len(made) > 2
    assert max(made) < 700


# -- what is stored in other dtypes


@pytest.mark.parametrize("base", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_the_dtype_in_memory_is_that_of_the_reference(
    base: torch.dtype, stored: torch.dtype, autocast: bool, tmp_path: Path
) -> None:
    made = parts()
    folder = Parts({name: tensor.to(stored) for name, tensor in made.tensors.items()}, made.config).write(tmp_path)
    ours = load(folder, llama().to(base), autocast_adapter_dtype=autocast)
    theirs = by_reference(folder, llama().to(base), autocast_adapter_dtype=autocast)
    expected = dict(named(theirs))
    for name, tensor in broken.adapter_tensors(ours).items():
        assert tensor.dtype is expected[name].dtype
        assert torch.equal(tensor, expected[name])


# -- pickles


def test_safetensors_is_preferred(tmp_path: Path) -> None:
    """Even where the pickle is damaged: it is not looked at."""
    folder = written(tmp_path, "safetensors")
    (folder / BIN).write_bytes(b"damaged")
    assert load(folder).load_report.placed == 8
    (folder / SAFETENSORS).write_bytes(b"damaged")
    with pytest.raises(splice.CheckpointError, match=SAFETENSORS):
        load(folder)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_bin_file_is_read_as_by_the_reference(legacy: bool, tmp_path: Path) -> None:
    made = parts()
    folder = made.write(tmp_path, as_bin=True)
    tensors = collections.OrderedDict(made.tensors)
    torch.save(tensors, folder / BIN, _use_new_zipfile_serialization=not legacy)
    torch.testing.assert_close(output(load(folder)), output(by_reference(folder)))


class _Payload:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


FORMS: dict[str, Callable[[Any, Path], None]] = {
    "zip": torch.save,
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "plain": lambda value, path: path.write_bytes(pickle.dumps(value)) and None,
    "oldest protocol": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=0)) and None,
    "newest protocol": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=5)) and None,
}
PLACES: dict[str, Callable[[Any], Any]] = {
    "alone": lambda payload: payload,
    "as a value": lambda payload: {**parts().tensors, "extra": payload},
    "as a name": lambda payload: {payload: torch.ones(1)},
    "in a list": lambda payload: [payload],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_in_a_pickle_is_run(form: str, place: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", "bin")
    FORMS[form](PLACES[place](_Payload(tmp_path / "run")), folder / BIN)
    model = llama()
    with broken.unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of some protocols
        for function in (
            lambda: splice.PeftModel.from_pretrained(model, folder),
            lambda: splice.load_peft_weights(folder),
        ):
            with pytest.raises((pickle.UnpicklingError, splice.CheckpointError), match="adapter_model.bin") as caught:
                function()
            assert "holds something other than tensors, and nothing of it was run" in str(caught.value)
            assert "safetensors" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list; an adapter is a dict of tensors"),
        (torch.ones(3), "holds a Tensor; an adapter is a dict of tensors"),
        (None, "holds a NoneType"),
        ({"a": 1}, "dict of tensors"),
        ({"a": {"b": torch.ones(1)}}, "dict of tensors"),
        ({"a": None, "b": torch.ones(1)}, "dict of tensors"),
        ({1: torch.ones(1)}, "dict of tensors"),
        ({("a", "b"): torch.ones(1)}, "dict of tensors"),
    ],
    ids=str,
)
def test_a_pickle_that_is_no_dict_of_tensors(content: Any, message: str, tmp_path: Path) -> None:
    folder, model = written(tmp_path, "bin"), llama()
    torch.save(content, folder / BIN)
    with broken.unchanged(model), pytest.raises(splice.CheckpointError, match=message):
        load(folder, model)


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.ones(4, 16).to_sparse(),
    "sparse rows": lambda: torch.ones(4, 16).to_sparse_csr(),
    "on meta": lambda: torch.empty(4, 16, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4, 16), 0.1, 0, torch.qint8),
    "complex": lambda: torch.ones(4, 16, dtype=torch.complex64),
    "boolean": lambda: torch.ones(4, 16, dtype=torch.bool),
}


@pytest.mark.parametrize("what", ODD)
def test_tensors_that_no_adapter_has(what: str, tmp_path: Path) -> None:
    made, model = parts(), llama()
    folder = made.write(tmp_path, as_bin=True)
    name = next(name for name in made.tensors if "lora_A" in name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({**made.tensors, name: ODD[what]()}, folder / BIN)
        with broken.unchanged(model), pytest.raises((splice.CheckpointError, splice.AdapterMismatchError)) as caught:
            splice.PeftModel.from_pretrained(model, folder)
    assert name in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 10, 200, 1000, -1, -30, -400])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_truncated_bin_file(form: str, length: int, tmp_path: Path) -> None:
    folder, model = written(tmp_path, "bin"), llama()
    FORMS[form](parts().tensors, folder / BIN)
    content = (folder / BIN).read_bytes()
    (folder / BIN).write_bytes(content[:length])
    with (
        broken.unchanged(model),
        pytest.raises((splice.CheckpointError, pickle.UnpicklingError), match="adapter_model.bin"),
    ):
        load(folder, model)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", b"PK\x03\x04" + bytes(40),
     b"<html></html>", bytes(100), b"\x80\x02."],
    ids=["empty", "text", "Git LFS pointer", "half a zip", "web page", "zeros", "empty pickle"],
)  # fmt: skip
def test_what_is_no_bin_file(content: bytes, tmp_path: Path) -> None:
    folder, model = written(tmp_path, "bin"), llama()
    (folder / BIN).write_bytes(content)
    with (
        broken.unchanged(model),
        pytest.raises((splice.CheckpointError, pickle.UnpicklingError), match="adapter_model.bin"),
    ):
        load(folder, model)


def test_a_git_lfs_pointer_in_place_of_a_bin_file(tmp_path: Path) -> None:
    folder = written(tmp_path, "bin")
    (folder / BIN).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises((splice.CheckpointError, pickle.UnpicklingError), match="Git LFS pointer"):
        load(folder)


def test_a_safetensors_file_under_the_name_of_a_pickle(tmp_path: Path) -> None:
    folder = written(tmp_path, "bin")
    save_file(parts().tensors, folder / BIN)
    with pytest.raises((splice.CheckpointError, pickle.UnpicklingError), match="adapter_model.bin"):
        load(folder)


def test_a_folder_in_place_of_a_bin_file(tmp_path: Path) -> None:
    folder = written(tmp_path, "bin")
    (folder / BIN).unlink()
    (folder / BIN).mkdir()
    with pytest.raises(splice.CheckpointError, match="is a folder"):
        load(folder)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = written(tmp_path, "safetensors"), llama()

    def refused(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refused)
    with broken.unchanged(model), pytest.raises(OSError, match="Permission denied"):
        load(folder, model)


def test_a_file_that_is_replaced_during_the_load(tmp_path: Path) -> None:
    """Header and tensors are of one file, whatever has its name by the time the tensors are read."""
    first, second = parts().write(tmp_path / "first") / SAFETENSORS, tmp_path / "second"
    expected = dict(parts().tensors)
    weights = open_weights(first)
    second.write_bytes(parts(seed=1, r=2).write(tmp_path / "other").joinpath(SAFETENSORS).read_bytes())
    second.replace(first)
    names = list(weights.entries)
    for name, tensor in zip(names, weights.read(names)):
        assert torch.equal(tensor, expected[name])


# -- entries without reading


def test_entries_of_tensors_in_memory_are_those_of_the_file(tmp_path: Path) -> None:
    made = parts()
    file = open_weights(made.write(tmp_path) / SAFETENSORS)
    memory = TensorsInMemory(made.tensors, "here")
    assert {n: (e.dtype, e.shape, e.size) for n, e in memory.entries.items()} == {
        n: (e.dtype, e.shape, e.size) for n, e in file.entries.items()
    }
