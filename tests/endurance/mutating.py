"""Checkpoints of every method with something changed by chance, and what splice makes of each."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

import splice
from splice.checkpoint.engines import engines
from splice.cli.commands import diff, inspect
from splice.cli.engines import asked
from splice.cli.main import GIVEN
from splice.cli.verifying import verify
from tests import bases
from tests.bases import run
from tests.broken import BIN, CONFIG, SAFETENSORS, assert_unchanged, picture
from tests.samples import network_cases, plain_cases

# Seconds of the processor after which an answer is none.
LIMIT = 20
# What a field of a config is set to, whatever it is.
VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 1e400, 10**30, "x", "", "(", "\x1b[2J", [], [1], [[]], ["("], {}, {"x": 1}, {"(": 1},
    {"q_proj": "y"}, {"v_proj": None}, "LORA", "ADALORA", "IA3", "VERA", "PROMPT_TUNING",
]  # fmt: skip


class Payload:
    """In a pickle: makes a file where it is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


class Source(NamedTuple):
    """An adapter that is sound, and the model that it is for."""

    # Its folder.
    folder: Path
    # A folder with the config of the model, for `splice verify`.
    config: Path
    # The model, from a cache.
    build: Callable[[], Any]
    # Of a call of it.
    inputs: dict[str, torch.Tensor]


def sources(folder: Path, methods: Iterable[str] = ()) -> list[Source]:
    """One adapter of each method (or of these), in safetensors and in a pickle, on a small Llama of transformers."""
    found, config = [], folder / "config"
    network: Any = bases.LLAMA.build()
    # Which it is, as the config of every model says that was saved.
    network.config.architectures = [type(network).__name__]
    network.config.save_pretrained(config)
    wanted = set(methods)
    for case in (*plain_cases(bases.LLAMA), *network_cases(bases.LLAMA)):
        name = case.method.name.value
        if (wanted and name not in wanted) or any(name == other.folder.name.partition(" ")[0] for other in found):
            continue
        torch.manual_seed(0)
        model: Any = splice.get_peft_model(case.base.build(), splice.get_peft_config(case.config()))
        for safe in (True, False):
            place = folder / f"{name} {'safetensors' if safe else 'pickle'}"
            model.save_pretrained(place, safe_serialization=safe)
            found.append(Source(place, config, case.base.build, case.base.inputs(2)))
    return found


# -- what is changed


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
        return _payload(file, draw)
    end = 8 + int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8:end])
    name = draw.choice([name for name in fields if name != "__metadata__"])
    entry = fields.pop(name)
    entry["shape"] = draw.choice([entry["shape"], [64], [], [1, 64], [16, 4], entry["shape"][::-1]])
    entry["dtype"] = draw.choice([entry["dtype"], entry["dtype"], "I32", "BF16", "F64"])
    part = draw.choice([*name.split("."), "layers", "base_model."])
    other = draw.choice(["", "..", "lora_B", "9" * 30])
    if draw.random() < 0.8:
        fields[name.replace(part, other)] = entry
    text = json.dumps(fields).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    return None


def _payload(file: Path, draw: random.Random) -> None:
    """A pickle that runs something, as torch writes it or as Python does, under either name."""
    tensors: dict[str, Any] = {"base_model.model.x": Payload(file.parent.parent / "ran")}
    if draw.random() < 0.5:
        data = io.BytesIO()
        torch.save(tensors, data, _use_new_zipfile_serialization=draw.random() < 0.5)
        raw = data.getvalue()
    else:
        raw = pickle.dumps(tensors)
    file.unlink()
    (file.parent / draw.choice([BIN, SAFETENSORS])).write_bytes(raw)


CHANGES: list[Callable[[Path, random.Random], None]] = [
    _bytes, _bytes, _cut, _field, _field, _field, _config, _header, _header, _payload,
]  # fmt: skip


def change(source: Source, place: Path, draw: random.Random) -> str:
    """A copy of an adapter with one thing changed; gives what."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source.folder, place)
    weights = next(path for path in place.iterdir() if path.name.startswith("adapter_model"))
    what = draw.choice(CHANGES)
    what(weights, draw)
    return what.__name__.strip("_")


# -- what is made of it


def answers(place: Path, source: Source, base: Any) -> tuple[str, str, str]:
    """What is said to an adapter by `inspect` with its relatives, by `verify`, and by a load onto `base`, each in a word.

    Raises:
        AssertionError: one took long, said no single sentence, or changed the model; or something in a file was run.
    """
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        looked_into, _ = _in_a_word(lambda: _looked_into(place, source))
        verified, _ = _in_a_word(lambda: int(bool(verify(str(place), None, None, str(source.config), None).refusal)))
        loaded, why = _in_a_word(lambda: _loaded(place, source, base))
    assert not (place.parent / "ran").exists(), f"{place}: something in it was run"
    # Which entries of a weight are meant stands among the values, which are not read where nothing is loaded.
    agree = (verified == "fine") == (loaded == "fine") or "holds indices from" in why
    assert agree, f"`verify` says {verified}, and a load {loaded}"
    return looked_into, verified, loaded


def _in_a_word(step: Callable[[], object]) -> tuple[str, str]:
    """ "fine", "problem" or "refused", and why it was refused."""
    start = time.process_time()
    try:
        code = step()
    except (*GIVEN, pickle.UnpicklingError) as error:  # the last is what the reference raises too
        said = str(error)
    else:
        return "problem" if code == 1 else "fine", ""
    finally:
        assert time.process_time() - start < LIMIT, "it takes long"
    assert said.strip(), "a refusal without a word"
    return "refused", said


def _looked_into(place: Path, source: Source) -> object:
    code = inspect.command.callback(str(place), None, None, True, None, place / "report.html", False)
    summary = inspect.look_into(inspect.open_adapter(str(place)))
    for engine in engines():
        asked(engine, summary)
    diff.command.callback(str(place), str(source.folder), True)
    return code


def _loaded(place: Path, source: Source, base: Any) -> int:
    before = picture(base)
    try:
        model: Any = splice.PeftModel.from_pretrained(base, place)
    except (*GIVEN, pickle.UnpicklingError):
        assert_unchanged(before, base)
        raise
    try:
        with suppress(*GIVEN):  # of a call that needs more than others, which is said in words
            run(model, source.inputs)
    finally:
        model.unload()
        assert_unchanged(before, base)
    return 0
