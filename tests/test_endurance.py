"""A little of `python -m tests.endurance`, which tries a hundred thousand."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import splice
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


@pytest.mark.parametrize(
    ("method", "field", "value", "words"),
    [
        ("LORA", "target_parameters", "x", "`target_parameters` is a list of names, got a string"),
        ("LORA", "lora_alpha", True, "`lora_alpha` should be int, got True"),
        ("P_TUNING", "encoder_hidden_size", -1, "`encoder_hidden_size` should be a positive integer, got -1"),
        ("P_TUNING", "encoder_hidden_size", True, "`encoder_hidden_size` should be int | None, got True"),
        ("IA3", "feedforward_modules", "(", "'(', in feedforward_modules of the config, is no regular expression"),
        ("OSF", "rank_pattern", {"(": 1}, "'(', in rank_pattern of the config, is no regular expression"),
        ("DELORA", "lambda_pattern", {"(": 1}, "'(', in lambda_pattern of the config, is no regular expression"),
        ("OSF", "effective_rank", float("inf"), "`effective_rank` should be int | float | None, got inf"),
        ("ADAMSS", "random_seed", 1.5, "`random_seed` should be a whole number, got 1.5"),
        ("PVERA", "generator_seed", True, "`generator_seed` should be a whole number, got True"),
    ],
)
def test_values_that_a_field_cannot_have(method: str, field: str, value: Any, words: str, tmp_path: Path) -> None:
    source = sources(tmp_path / "sound", [method])[0]
    config = source.folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    assert answers(source.folder, source, source.build())[2] == "refused"
    with pytest.raises(ValueError, match=re.escape(words)) as told:
        splice.PeftModel.from_pretrained(source.build(), source.folder)
    assert isinstance(told.value, TypeError) or field != "target_parameters", "as the reference raises it"


def test_a_base_is_made_by_what_its_config_names_where_the_adapter_names_no_task(tmp_path: Path) -> None:
    source = sources(tmp_path / "sound", ["SHADOW"])[0]
    config = source.folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": None}))
    assert answers(source.folder, source, source.build())[1:] == ("fine", "fine")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("count", [10, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_saves_and_merges_leave_the_old_or_the_new(count: int, tmp_path: Path) -> None:
    print(kill_often(count, random.Random(count).randrange(1000), tmp_path))
