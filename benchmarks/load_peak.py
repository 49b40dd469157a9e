"""The process in which one load is watched: `python -m benchmarks.load_peak LIBRARY CHECKPOINT LAYERS WARM_UP [--nf4]`.

It prints a `Peak` as JSON. A process of its own, because what an earlier load has freed would hide what this one takes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure import collect_garbage
from benchmarks.models import in_four_bits, llama, load

WIDTH = 512
WARM_UP_WIDTH = 64
_PERIOD = 0.001
_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Peak:
    """Bytes of the adapter, and by how many the process grew during its load: all resident pages, and private ones."""

    adapter: int
    resident: int
    private: int


@dataclass
class Watch:
    """The highest values of this process's memory counters (bytes) so far."""

    highest: dict[str, int] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.done.wait(_PERIOD):
            self.look()

    def look(self) -> None:
        for name, value in _counters().items():
            self.highest[name] = max(value, self.highest.get(name, 0))


def base(layers: int, width: int, nf4: bool = False) -> nn.Module:
    """The model that is loaded onto."""
    model = llama(layers, width, torch.device("cpu"))
    return in_four_bits(model) if nf4 else model


def main() -> None:
    """Warm up, load, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("layers", type=int)
    parser.add_argument("warm_up", type=Path)
    parser.add_argument("--nf4", action="store_true")
    options = parser.parse_args()
    load(options.library, base(1, WARM_UP_WIDTH, options.nf4), options.warm_up)
    model = base(options.layers, WIDTH, options.nf4)
    print(json.dumps(asdict(_watched(options.library, model, options.checkpoint))))


def _watched(library: str, model: nn.Module, checkpoint: Path) -> Peak:
    _return_freed_memory()
    exact = _forget_high_water_mark()
    before = _counters()
    with _watching() as watch:
        adapted = load(library, model, checkpoint)
    top = watch.highest["VmHWM" if exact else "VmRSS"]
    adapter = sum(p.nbytes for name, p in adapted.named_parameters() if "lora_" in name)
    return Peak(adapter, top - before["VmRSS"], watch.highest["RssAnon"] - before["RssAnon"])


def _return_freed_memory() -> None:
    """Otherwise the load could use pages that building the base has left behind, and seem to need none."""
    collect_garbage()
    ctypes.CDLL(None).malloc_trim(0)


def _forget_high_water_mark() -> bool:
    """Make VmHWM start anew; it misses no peak, where samples may. False where the system does not allow it."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


@contextmanager
def _watching() -> Iterator[Watch]:
    watch = Watch()
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.done.set()
        thread.join()
        watch.look()


def _counters() -> dict[str, int]:
    status = dict(line.split(":", 1) for line in (_PROCESS / "status").read_text().splitlines())
    return {name: int(status[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssAnon")}


if __name__ == "__main__":
    main()
