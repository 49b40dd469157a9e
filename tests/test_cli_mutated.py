"""Checkpoints with something changed by chance: the commands answer in a sentence, and never with a traceback."""

from __future__ import annotations

import json
import random
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from splice.checkpoint.engines import engines
from splice.cli.commands import diff, inspect
from splice.cli.engines import asked
from splice.cli.main import GIVEN
from splice.cli.verifying import verify
from tests.broken import CONFIG, llama, parts

# What a field of a config is set to, whatever it is.
VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 1e400, 10**30, "x", "", "(", "\x1b[2J", [], [1], [[]], ["("], {}, {"x": 1}, {"(": 1},
    {"q_proj": "y"}, {"v_proj": None}, "LORA", "ADALORA", "IA3", "VERA", "PROMPT_TUNING",
]  # fmt: skip


def _bytes(file: Path, draw: random.Random) -> None:
    raw = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 5, 50])):
        # Most of them in the header, where they are more than another value.
        raw[draw.randrange(min(len(raw), draw.choice([100, 3000, len(raw)])))] = draw.randrange(256)
    file.write_bytes(raw)


def _cut(file: Path, draw: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size + 1)])


def _field(file: Path, draw: random.Random) -> None:
    path = file.parent / CONFIG
    fields = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(draw.randint(1, 3)):
        fields[draw.choice(list(fields))] = draw.choice(VALUES)
    path.write_text(json.dumps(fields), encoding="utf-8")


def _config(file: Path, draw: random.Random) -> None:
    _bytes(file.parent / CONFIG, draw)


def _header(file: Path, draw: random.Random) -> None:
    """Another name, shape or dtype, or a tensor less."""
    raw = file.read_bytes()
    if file.suffix != ".safetensors":
        return _bytes(file, draw)
    end = 8 + int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8:end])
    name = draw.choice([name for name in fields if name != "__metadata__"])
    entry = fields.pop(name)
    entry["shape"] = draw.choice([entry["shape"], [64], [], [1, 64], [16, 4], entry["shape"][::-1]])
    entry["dtype"] = draw.choice([entry["dtype"], entry["dtype"], "I32", "BF16", "F64"])
    part, other = (
        draw.choice(["lora_A", "layers", "base_model.", "q_proj"]),
        draw.choice(["", "..", "lora_B", "9" * 30]),
    )
    if draw.random() < 0.8:
        fields[name.replace(part, other)] = entry
    text = json.dumps(fields).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    return None


CHANGES: list[Callable[[Path, random.Random], None]] = [_bytes, _cut, _field, _field, _field, _config, _header, _header]


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_every_answer_is_a_sentence(count: int, tmp_path: Path) -> None:
    sources = [
        parts().write(tmp_path / "plain"),
        parts(use_rslora=True, rank_pattern={"v_proj": 2}, modules_to_save=["lm_head"]).write(tmp_path / "whole"),
        parts(use_dora=True).write(tmp_path / "pickle", as_bin=True),
    ]
    base = tmp_path / "base"
    llama().config.save_pretrained(base)
    draw, answers = random.Random(0), Counter[str]()
    for index in range(count):
        place = tmp_path / "changed"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(draw.choice(sources), place)
        weights = next(path for path in place.iterdir() if path.name.startswith("adapter_model"))
        draw.choice(CHANGES)(weights, draw)
        start = time.process_time()
        answers[_answer(place, sources[0], base)] += 1
        assert time.process_time() - start < 20, f"the {index}. takes long: {place}"
    assert set(answers) == {"fine", "problem", "refused"}, "all of them, since changes are of every kind"


def _answer(place: Path, other: Path, base: Path) -> str:
    """What all commands make of an adapter, in a word."""
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            report = place / "report.html"
            code = inspect.command.callback(str(place), None, None, True, None, report, False)
            summary = inspect.look_into(inspect.open_adapter(str(place)))
            for engine in engines():
                asked(engine, summary)
            diff.command.callback(str(place), str(other), True)
            verify(str(place), None, None, str(base), None)
            return "problem" if code else "fine"
        except GIVEN as error:
            return "refused" if str(error) else "without a word"
