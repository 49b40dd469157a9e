"""Processes that are killed (SIGKILL) at a moment drawn by chance, while they save an adapter or merge one on disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import splice
from tests.broken import forked, llama, load, output, parts

OLD, NEW, NOTHING = "old", "new", "nothing"


def killed_after(run: Callable[[], object], seconds: float) -> bool:
    """Run it in a forked process, and kill that after so many seconds; whether it was still running.

    Raises:
        AssertionError: it failed before.
    """
    child = forked(run)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"it ended with {code}"
    return code != 0


def _taken(run: Callable[[], object]) -> float:
    run()  # which imports and fills caches
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def killed_saves(count: int, seed: int, folder: Path) -> Counter[str]:
    """What a folder holds after a save over another one that was killed -> how often. In both formats, taking turns."""
    models: dict[str, Any] = {
        OLD: load(parts(lora_alpha=8).write(folder / OLD)),
        NEW: load(parts(seed=1, lora_alpha=16).write(folder / NEW)),
    }
    outputs, draw, found = {name: output(model) for name, model in models.items()}, random.Random(seed), Counter[str]()
    out = folder / "out"

    def save(safe: bool) -> None:
        models[NEW].save_pretrained(out, safe_serialization=safe)

    longest = {safe: 2 * _taken(lambda safe=safe: save(safe)) for safe in (True, False)}  # type: ignore[misc]
    for number in range(count):
        safe = number % 2 == 0
        shutil.rmtree(out)
        models[OLD].save_pretrained(out, safe_serialization=safe)
        killed_after(lambda safe=safe: save(safe), draw.uniform(0, longest[safe]))  # type: ignore[misc]
        now = output(load(out))
        found[next((name for name, own in outputs.items() if torch.equal(now, own)), "neither")] += 1
    return found


def killed_merges(count: int, seed: int, folder: Path) -> Counter[str]:
    """What is there after a merge on disk that was killed -> how often; started again, each came to its end."""
    base, adapter, out = folder / "base", parts().write(folder / "adapter"), folder / "merged"
    llama(layers=2).save_pretrained(base, max_shard_size=4000)
    splice.merge_files(base, [adapter], folder / "expected")
    expected, draw, found = _bytes_in(folder / "expected"), random.Random(seed), Counter[str]()

    def merge() -> None:
        splice.merge_files(base, [adapter], out)

    def fresh() -> None:
        shutil.rmtree(out, ignore_errors=True)
        merge()

    longest = 2 * _taken(fresh)
    for _ in range(count):
        shutil.rmtree(out, ignore_errors=True)
        killed_after(merge, draw.uniform(0, longest))
        if not out.exists():
            found[NOTHING] += 1
            merge()
            assert _bytes_in(out) == expected, "what goes on is not what would have been written at once"
        else:
            found[NEW if _bytes_in(out) == expected else "neither"] += 1
            with pytest.raises(FileExistsError):
                merge()
        left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert not left, f"{left} is left behind"
    return found


def _bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_often(count: int, seed: int, folder: Path) -> str:
    """Kill so many processes, half of them in a save and half in a merge; what was found, in words.

    Raises:
        AssertionError: something was left that is neither the old nor the new.
    """
    saves = killed_saves(count // 2, seed, folder / "saves")
    merges = killed_merges(count - count // 2, seed, folder / "merges")
    assert set(saves) <= {OLD, NEW}, saves
    assert set(merges) <= {NOTHING, NEW}, merges
    return (
        f"{saves.total()} saves killed: {saves[OLD]} times the old checkpoint, {saves[NEW]} times the new one\n"
        f"{merges.total()} merges killed: {merges[NOTHING]} times nothing, {merges[NEW]} times the whole model; "
        "started again, each came to its end"
    )
