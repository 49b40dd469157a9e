"""The peak of memory during a load, in a fresh process for each library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.load_peak import WARM_UP_WIDTH, WIDTH, Peak, base
from benchmarks.measure import Settings
from benchmarks.models import LLAMA_TARGETS, REFERENCE, SPLICE, write_checkpoint
from benchmarks.report import Row, row


def rows(settings: Settings, *options: str) -> Iterator[Row]:
    """What the process grows by during `from_pretrained`, in multiples of the adapter's own bytes; on the CPU.

    `options` are for the process in which it loads.
    """
    layers = settings.pick(32, 2)
    checkpoint = write_checkpoint(base(layers, WIDTH), settings.folder / "memory", LLAMA_TARGETS, rank=128)
    warm_up = write_checkpoint(base(1, WARM_UP_WIDTH), settings.folder / "memory-warm-up", LLAMA_TARGETS, rank=4)

    def measure(library: str) -> Peak:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.load_peak"]
        arguments = [library, str(checkpoint), str(layers), str(warm_up), *options]
        return Peak(**json.loads(subprocess.check_output([*command, *arguments], text=True)))

    reference, ours = measure(REFERENCE), measure(SPLICE)
    what = f"peak memory of a load, in adapters of {ours.adapter / 1e6:.0f} MB"
    yield row(what, reference.resident / reference.adapter, ours.resident / ours.adapter, "x").at_most(1.1)
    yield row(f"{what}: private", reference.private / reference.adapter, ours.private / ours.adapter, "x")
