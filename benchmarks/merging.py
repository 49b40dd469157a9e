"""A merge on disk, beside copying the same files: the least that writing a model again can cost."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import splice
from benchmarks.measure import Samples, Settings, alternate
from benchmarks.models import LLAMA_TARGETS, llama, write_checkpoint
from benchmarks.report import Row, row

_COPY = "cp"
_MERGE = "splice merge"


def rows(settings: Settings) -> Iterator[Row]:
    """LoRA of rank 16 on two and on all seven linear layers of each block; the reference's column is `cp -r`."""
    network = llama(settings.pick(10, 1), settings.pick(2048, 256), torch.device("cpu"), torch.bfloat16)
    base = settings.folder / "merging"
    network.save_pretrained(base, max_shard_size=settings.pick(250_000_000, 1_000_000))
    size = sum(file.stat().st_size for file in base.iterdir())
    for targets in (("q_proj", "v_proj"), LLAMA_TARGETS):
        adapter = write_checkpoint(network, settings.folder / f"merging {len(targets)}", targets, rank=16)
        samples = _both(base, adapter, settings)
        what = f"merge on disk, {size / 1e9:.1f} GB, {len(targets)} layers a block, beside cp"
        yield row(what, samples[_COPY].median, samples[_MERGE].median, "s").at_least(0.5)


def _both(base: Path, adapter: Path, settings: Settings) -> dict[str, Samples]:
    out = settings.folder / "merged"
    candidates: dict[str, Callable[[], float]] = {
        _COPY: lambda: _written(out, lambda: subprocess.run(["cp", "-r", base, out], check=True)),
        _MERGE: lambda: _written(out, lambda: splice.merge_files(base, [adapter], out)),
    }
    return alternate(candidates, rounds=settings.pick(7, 1))


def _written(out: Path, write: Callable[[], object]) -> float:
    """Seconds until what is written to `out` is on the disk."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    write()
    os.sync()
    return time.perf_counter() - start
