"""A little of `python -m tests.endurance`, which tries a hundred thousand."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from tests.endurance.__main__ import tried
from tests.endurance.killing import kill_often
from tests.endurance.mutating import Source, answers, sources

SOME = ("LORA", "IA3", "VERA", "TRAINABLE_TOKENS", "PREFIX_TUNING")


@pytest.mark.parametrize(
    ("count", "methods"),
    [
        pytest.param(150, SOME, id="some"),
        pytest.param(2000, (), id="many", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_every_answer_is_a_sentence(count: int, methods: tuple[str, ...], tmp_path: Path) -> None:
    found = tried(count, 0, tmp_path, methods)
    assert found.faults == []
    assert found.answers.total() == count
    words = {word for answer in found.answers for word in answer.split()}
    assert words == {"fine", "problem", "refused"}, "all of them, since changes are of every kind"


@pytest.mark.parametrize("methods", [SOME, pytest.param((), marks=pytest.mark.slow)], ids=["some", "all"])
def test_what_is_sound_is_fine(methods: tuple[str, ...], tmp_path: Path) -> None:
    for source in sources(tmp_path / "sound", methods):
        place = tmp_path / "same"
        source.folder.rename(place)
        found = answers(place, Source(place, *source[1:]), source.build())
        assert set(found) <= {"fine", "problem"} and found[1:] == ("fine", "fine"), source.folder.name
        place.rename(source.folder)
        (source.folder / "report.html").unlink()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("count", [10, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_saves_and_merges_leave_the_old_or_the_new(count: int, tmp_path: Path) -> None:
    print(kill_often(count, random.Random(count).randrange(1000), tmp_path))
