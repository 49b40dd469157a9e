"""What adapters cost on a GPU, against the reference and against the bytes that must move.

Run it from a checkout, on any machine with a CUDA GPU that has torch, transformers, safetensors and the reference:
`PYTHONPATH=src python -m benchmarks.gpu`. It takes less than eight minutes: parts that could not be done by then are left
out, and named. It needs no network. `--dry` runs it small, on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.forward import BASE, Call, added, logits_of, with_adapters
from benchmarks.measure import Settings, alternate, collect_garbage, timed
from benchmarks.models import LIBRARIES, LLAMA_TARGETS, REFERENCE, SPLICE, llama, load, write_checkpoint
from benchmarks.report import Row, header, line, machine, row, write_json
from splice.errors import counted

_RANK = 16
# How many adapters the rows of a mixed batch share; there are as many rows as the last.
_ADAPTERS = (1, 8, 32)
# Seconds after which no further part is begun: the longest, whose graphs are compiled, takes less than two minutes.
_LAST_BEGIN = 360
# How far half-precision logits of two orders of summation may lie apart.
_TOLERANCE = 5e-2


def main() -> int:
    """Run all, print each row as soon as it is known; 2 where there is no GPU."""
    options = _parser().parse_args()
    if not options.dry and not torch.cuda.is_available():
        print("no CUDA GPU here; --dry shows on the CPU that everything works", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry else "cuda")
    warnings.simplefilter("ignore")
    print(machine(device))
    if options.dry:
        print("A dry run shows that everything works; its figures mean nothing.")
    print(header(), flush=True)
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="splice-benchmarks-") as folder:
        for one in rows(Settings(Path(folder), device, options.dry)):
            found.append(one)
            print(line(one), flush=True)
    if options.json:
        write_json(options.json, found, device)
    return 0


def rows(settings: Settings) -> Iterator[Row]:
    """A load onto the GPU, a decode step eager and compiled, and batches whose rows have adapters of their own.

    What matters most comes first, since the last parts may be left out.
    """
    begin = time.monotonic()
    base = llama(settings.pick(8, 1), settings.pick(2048, 64), settings.device, torch.bfloat16)
    checkpoint = write_checkpoint(base, settings.folder / "adapter", LLAMA_TARGETS, _RANK)
    targets = sum(name.endswith(LLAMA_TARGETS) for name, _ in base.named_modules())
    # The file holds what the reference trains: float32, as large in memory.
    size = (checkpoint / "adapter_model.safetensors").stat().st_size
    speed, link = _speed_of_memory(settings), _speed_of_link(settings)
    counts = (1, 2, 4) if settings.small else _ADAPTERS
    most, long = counts[-1], settings.pick(64, 2)
    mixed = {
        (count, tokens): partial(_mixed_rows, base, checkpoint, count, tokens, count * size / speed, settings)
        for count in counts
        for tokens in (1, long)
    }
    parts = {
        "a load": partial(_load_rows, base, checkpoint, size / link, settings),
        f"{most} adapters, 1 token": mixed.pop((most, 1)),
        "rows that change under CUDA graphs": partial(
            _changing_rows, base, checkpoint, most, most * size / speed, settings
        ),
        "a decode step": partial(_decode_rows, base, checkpoint, targets, size / speed, settings),
        **{f"{counted(count, 'adapter')}, {counted(tokens, 'token')}": part for (count, tokens), part in mixed.items()},
    }
    for what, part in parts.items():
        if time.monotonic() - begin > _LAST_BEGIN:
            print(f"left out, for lack of time: {what}", file=sys.stderr)
            continue
        yield from part()


def _load_rows(base: nn.Module, checkpoint: Path, floor: float, settings: Settings) -> Iterator[Row]:
    def candidate(library: str) -> float:
        fresh = copy.deepcopy(base)
        collect_garbage()
        return timed(lambda: load(library, fresh, checkpoint), settings.device)

    samples = alternate({library: partial(candidate, library) for library in LIBRARIES}, settings.pick(7, 1))
    times = {library: samples[library].median for library in LIBRARIES}
    yield from _compared("from_pretrained onto the GPU", times, 1e3, "ms", floor)


def _decode_rows(base: nn.Module, checkpoint: Path, targets: int, floor: float, settings: Settings) -> Iterator[Row]:
    ids = torch.ones(1, 1, dtype=torch.long, device=settings.device)
    models: dict[str, Any] = {BASE: base}
    for library in LIBRARIES:
        models[library] = load(library, copy.deepcopy(base), checkpoint)
    eager: dict[str, Call] = {name: partial(logits_of, model, ids) for name, model in models.items()}
    yield from _added_rows("decode step, eager, for each linear", eager, targets, floor, settings)
    compiled: dict[str, Call] = {n: partial(logits_of, torch.compile(m), ids) for n, m in models.items()}
    yield from _added_rows("decode step, compiled, for each linear", compiled, targets, floor, settings)


def _mixed_rows(
    base: nn.Module, checkpoint: Path, count: int, tokens: int, floor: float, settings: Settings
) -> Iterator[Row]:
    """A batch whose rows share `count` adapters: by names, and in slots, compiled and captured too."""
    rows = settings.pick(_ADAPTERS[-1], 4)
    adapters = [f"adapter-{number}" for number in range(count)]
    names = [adapters[row % count] for row in range(rows)]
    ids = torch.arange(rows * tokens, device=settings.device).view(rows, tokens) % 256
    what = f"mixed batch, {rows} rows, {counted(count, 'adapter')}, {counted(tokens, 'token')} each"
    calls: dict[str, Call] = {BASE: partial(logits_of, base, ids)}
    for library in LIBRARIES:
        model: Any = with_adapters(library, base, checkpoint, adapters)
        calls[library] = partial(logits_of, model, ids, adapter_names=names)
    rounds = settings.pick(30, 2)
    eager = added(calls, settings.device, rounds, _TOLERANCE)
    yield from _compared(what, eager, 1e6, "us", floor)

    # What each way adds to a base that is called in the same way, beside what the reference adds: it can only be eager.
    def beside(way: str) -> Iterator[Row]:
        found = added(calls, settings.device, rounds, _TOLERANCE)
        yield from _compared(f"{what}, {way}", {**found, REFERENCE: eager[REFERENCE]}, 1e6, "us", floor)

    model.slots(rows, _RANK)
    yield from beside("in slots")
    by_slots = model.slot_rows(names)
    compile_all = partial(torch.compile, fullgraph=True, **({"backend": "eager"} if settings.small else {}))
    calls[BASE] = partial(logits_of, compile_all(base), ids)
    calls[SPLICE] = partial(logits_of, compile_all(model), ids, adapter_names=by_slots)
    yield from beside("in slots, compiled")
    calls[BASE], calls[SPLICE] = _captured(calls[BASE], settings), _captured(calls[SPLICE], settings)
    yield from beside("in slots, in a CUDA graph")


def _changing_rows(base: nn.Module, checkpoint: Path, count: int, floor: float, settings: Settings) -> Iterator[Row]:
    """Slots in graphs that torch captures itself (`mode="reduce-overhead"`), while adapters come and go.

    Raises:
        AssertionError: a call computes something else than the same adapters by their names.
    """
    names = [f"adapter-{number}" for number in range(count)]
    ids = torch.arange(count, device=settings.device).unsqueeze(1)
    what = f"mixed batch, {count} rows, {counted(count, 'adapter')}, 1 token each, in slots, reduce-overhead"
    calls: dict[str, Call] = {BASE: partial(logits_of, base, ids)}
    for library in LIBRARIES:
        model: Any = with_adapters(library, base, checkpoint, names)
        calls[library] = partial(logits_of, model, ids, adapter_names=names)
    rounds = settings.pick(30, 2)
    eager = added(calls, settings.device, rounds, _TOLERANCE)
    reference = calls[REFERENCE]
    other = write_checkpoint(base, settings.folder / "other", LLAMA_TARGETS, _RANK)
    # One more slot, for adapters that come and go.
    model.slots(count + 1, _RANK)
    by_slots = model.slot_rows(names)
    torch._dynamo.reset()
    options: dict[str, Any] = {"backend": "eager"} if settings.small else {"mode": "reduce-overhead"}
    compiled = {
        BASE: partial(logits_of, torch.compile(base, fullgraph=True, **options), ids),
        SPLICE: partial(logits_of, torch.compile(model, fullgraph=True, **options), ids, adapter_names=by_slots),
    }
    calls = {name: partial(_replayed, call) for name, call in compiled.items()}
    with torch.inference_mode():
        for call in calls.values():
            for _ in range(3):  # compiled, captured, replayed
                call()
        found = added({**calls, REFERENCE: reference}, settings.device, rounds, _TOLERANCE)
    yield from _compared(what, {**found, REFERENCE: eager[REFERENCE]}, 1e6, "us", floor)

    turns = iter(range(1, 1_000_000))

    def other_rows() -> torch.Tensor:
        turn = next(turns) % count
        by_slots.assign([*names[turn:], *names[:turn]])
        return calls[SPLICE]()

    with graphs_made() as made, torch.inference_mode():
        found = added(
            {BASE: calls[BASE], SPLICE: other_rows, REFERENCE: reference}, settings.device, rounds, _TOLERANCE
        )
        for number in range(settings.pick(20, 3)):
            mixture = [f"new-{number}", *names[1:]]
            model.load_adapter(other, adapter_name=mixture[0])
            by_slots.assign(mixture)
            expected = logits_of(model, ids, adapter_names=mixture)
            torch.testing.assert_close(calls[SPLICE](), expected, rtol=_TOLERANCE, atol=_TOLERANCE)
            by_slots.assign(names)
            model.delete_adapter(mixture[0])
    yield from _compared(f"{what}, other rows at each call", {**found, REFERENCE: eager[REFERENCE]}, 1e6, "us", floor)
    changes = "while rows changed, and adapters came and went"
    yield Row(f"- graphs compiled {changes}", math.nan, made.compiled, "graphs", math.nan).at_most(0)
    yield Row(f"- CUDA graphs captured {changes}", math.nan, made.captured, "graphs", math.nan).at_most(0)


def _replayed(call: Call) -> torch.Tensor:
    """What a call gives that torch may replay from a CUDA graph: in memory of its own, which the next one leaves alone."""
    torch.compiler.cudagraph_mark_step_begin()
    return call().clone()


@dataclass
class Made:
    """How many graphs were made."""

    compiled: int = 0
    captured: int = 0


@contextmanager
def graphs_made() -> Iterator[Made]:
    """Counts, until its end, the graphs that torch compiles, and those that it captures on a GPU."""
    made, graphs = Made(), torch._dynamo.utils.counters["stats"]
    before, begin = graphs["unique_graphs"], torch.cuda.graph.__enter__

    def counted_begin(graph: torch.cuda.graph) -> None:
        made.captured += 1
        begin(graph)

    torch.cuda.graph.__enter__ = counted_begin
    try:
        yield made
    finally:
        torch.cuda.graph.__enter__ = begin
        made.compiled = graphs["unique_graphs"] - before


@torch.inference_mode()
def _captured(call: Call, settings: Settings) -> Call:
    """`call` as a CUDA graph that is replayed; as it is in a dry run."""
    if settings.small:
        return call
    # As torch asks for: a few calls on another stream first, which allocate what calls keep.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def _added_rows(what: str, calls: dict[str, Call], parts: int, floor: float, settings: Settings) -> Iterator[Row]:
    more = added(calls, settings.device, settings.pick(30, 2), _TOLERANCE)
    yield from _compared(what, {name: seconds / parts for name, seconds in more.items()}, 1e6, "us", floor / parts)


def _compared(what: str, times: dict[str, float], factor: float, unit: str, floor: float) -> Iterator[Row]:
    yield row(what, times[REFERENCE] * factor, times[SPLICE] * factor, unit)
    yield row("- in times that its bytes take to move once", times[REFERENCE] / floor, times[SPLICE] / floor, "x")


def _speed_of_memory(settings: Settings) -> float:
    """Bytes a second that the device reads: a copy reads each and writes it."""
    block = torch.empty(settings.pick(2**30, 2**20), dtype=torch.uint8, device=settings.device)
    return 2 * block.nbytes / _fastest(lambda: block.clone(), settings)


def _speed_of_link(settings: Settings) -> float:
    """Bytes a second from memory that the system may page, as that of a file is, to the device."""
    block = torch.ones(settings.pick(2**28, 2**20), dtype=torch.uint8)
    there = torch.empty_like(block, device=settings.device)
    return block.nbytes / _fastest(lambda: there.copy_(block), settings)


def _fastest(call: Callable[[], object], settings: Settings) -> float:
    return min(timed(call, settings.device) for _ in range(10))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="splice against the reference on a GPU"
    )
    parser.add_argument("--dry", action="store_true", help="small and on the CPU, only to see that everything works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file as well")
    return parser


if __name__ == "__main__":
    sys.exit(main())
