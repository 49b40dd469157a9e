"""A load makes layers while their tensors are still being read: nothing looks at values that are not there yet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import splice
from splice.checkpoint import reading
from splice.checkpoint.reading import Reading
from splice.checkpoint.tensors import SafetensorsFile
from splice.errors import CheckpointError
from splice.kinds.registry import all_methods
from splice.loading import commit
from tests import bases, broken
from tests.bases import run
from tests.comparing import assert_same_tensors, state_of
from tests.samples import Case, option_cases, plain_cases
from tests.test_kinds import used_by

# Long beside the making of a few layers.
LATE = 0.1
FEW = (bases.LINEAR, bases.EMBEDDING, bases.CONV2D, bases.LLAMA)
AHEAD = {method.name for method in all_methods().values() if any(not cls.reads_values for cls in used_by(method))}
CASES = [case for case in (*plain_cases(*FEW), *option_cases(bases.LLAMA)) if case.method.name in AHEAD]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Values come late, however few they are; gives the names of the threads that read."""
    readers: list[str] = []
    fill = SafetensorsFile._fill_memory

    def fill_late(self: SafetensorsFile, targets: list[memoryview], offset: int) -> None:
        readers.append(threading.current_thread().name)
        if readers[-1] == "splice-read":
            for target in targets:
                target[:] = b"\xff" * len(target)  # not a number, for whoever looks too early
            time.sleep(LATE)
        fill(self, targets, offset)

    monkeypatch.setattr(reading, "_WORTH_A_THREAD", 0)
    monkeypatch.setattr(SafetensorsFile, "_fill_memory", fill_late)
    return readers


def loaded(case: Case, folder: Path, **options: Any) -> Any:
    return splice.PeftModel.from_pretrained(case.base.build(), folder, **options).eval()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_that_come_late(case: Case, shared_checkpoint: Any, request: pytest.FixtureRequest) -> None:
    folder = shared_checkpoint(case.base, case.config())
    in_time = loaded(case, folder)
    readers = request.getfixturevalue("late")
    model = loaded(case, folder)
    assert "splice-read" in readers
    assert_same_tensors(state_of(model), state_of(in_time))
    assert torch.equal(run(model, case.base.inputs(3)), run(in_time, case.base.inputs(3)))


def test_values_that_are_cast_are_waited_for(shared_checkpoint: Any, request: pytest.FixtureRequest) -> None:
    """A base in half precision has its adapters so, where it is asked for."""
    case = next(case for case in CASES if case.base is bases.LLAMA)
    folder = shared_checkpoint(case.base, case.config())

    def adapter() -> dict[str, torch.Tensor]:
        model = splice.PeftModel.from_pretrained(case.base.build().bfloat16(), folder, autocast_adapter_dtype=False)
        return splice.get_peft_model_state_dict(model)

    in_time = adapter()
    request.getfixturevalue("late")
    assert {tensor.dtype for tensor in in_time.values()} == {torch.bfloat16}
    assert_same_tensors(adapter(), in_time)


def test_layers_are_made_meanwhile(tmp_path: Path, late: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    def noted(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            happened.append(what)
            return real(*given)

        return call

    monkeypatch.setattr(commit, "_build", noted("made", commit._build))
    monkeypatch.setattr(Reading, "wait", noted("waited", Reading.wait))
    broken.load(broken.parts().write(tmp_path))
    assert happened == ["made"] * 4 + ["waited"]


@pytest.mark.parametrize("threaded", [False, True])
def test_a_file_that_is_cut_off_meanwhile(threaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong in the thread that reads is told by the load, and the model is as it was."""
    folder = broken.parts().write(tmp_path)
    monkeypatch.setattr(reading, "_WORTH_A_THREAD", 0 if threaded else 1 << 40)
    fill = SafetensorsFile._fill_memory

    def cut(self: SafetensorsFile, targets: Sequence[memoryview], offset: int) -> None:
        with open(self.path, "r+b") as file:
            file.truncate(offset + 1)
        fill(self, list(targets), offset)

    base = broken.llama()
    monkeypatch.setattr(SafetensorsFile, "_fill_memory", cut)
    with broken.unchanged(base), pytest.raises(CheckpointError, match="was cut off while it was read"):
        splice.PeftModel.from_pretrained(base, folder)


def test_memory_outlives_whoever_should_have_waited(late: list[str]) -> None:
    """A load that is cut short leaves a reader behind, which still writes into the memory that it was given."""
    done = threading.Event()
    tensors = [torch.zeros(1000)]
    data = [tensor.data_ptr() for tensor in tensors]

    def fill() -> None:
        time.sleep(LATE)
        assert started.tensors[0].data_ptr() == data[0]
        done.set()

    started = Reading(tensors, fill, 4000)
    del tensors
    assert done.wait(10 * LATE)
    started.wait()


def test_where_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values are read when they are waited for."""
    folder = broken.parts().write(tmp_path)
    expected = broken.output(broken.load(folder))

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(reading, "_WORTH_A_THREAD", 0)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert torch.equal(broken.output(broken.load(folder)), expected)
